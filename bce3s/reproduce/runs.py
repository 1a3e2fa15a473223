"""The runs behind a table: one a row and seed, and which of them are finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bce3s.config import TrainConfig, to_json
from bce3s.reproduce.grid import Budget, Row, Table
from bce3s.retrain.record import is_stage_two, require_same_retraining, retraining_command, started_from
from bce3s.retrain.stage_one import stage_two_folder
from bce3s.runlog import CONFIG_FILE, read_json
from bce3s.seeds import is_finished
from bce3s.throughput.command import resolve_config
from bce3s.train import checkpoint_of_result, saved_loader
from bce3s.train.state import require_same_config
from pipelines.config import require
from pipelines.types import ConfigError

RECORD_FILE = "reproduce.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a table.

    Args:
        name: of its row or rows, with the seed.
        config: resolved, but for "auto".
        recipe, settings: what `config` was resolved from, the seed aside.
        stages: 1, or 2 with the classifier trained anew.
        shards: folder.
        out: run folder.
    """

    name: str
    config: TrainConfig
    recipe: str
    settings: tuple[str, ...]
    stages: int
    shards: Path | str
    out: Path

    @property
    def stage_two(self) -> Path:
        """Folder of stage two, where there is one."""
        return stage_two_folder(self.out, self.config.retrain)

    @property
    def finished(self) -> bool:
        """Whether the logs of all its stages end with their summaries."""
        return is_finished(self.out) and (self.stages == 1 or is_finished(self.stage_two))

    def command(self) -> list[str]:
        """The arguments of `bce3s` that train the same run by hand."""
        settings = [part for setting in self.settings for part in ("--set", setting)]
        named = ["--dataset", self.config.dataset, "--recipe", self.recipe, "--seed", str(self.config.seed), *settings]
        named += [] if self.config.device == "auto" else ["--device", self.config.device]
        places = ["--shards", str(self.shards), "--out", str(self.out), "--resume"]
        return ["fast-train", *named, *(["--stages", "2"] if self.stages == 2 else []), *places]


def plan_runs(table: Table, rows: Sequence[Row], seeds: Sequence[int], shards: dict[str, Path | str], out: Path) -> list[Run]:
    """What it takes: all rows with the first seed, then all with the second, so that a table is useful before it is full.

    Args:
        table: of the rows.
        rows: to be trained; those that share runs are trained once.
        seeds: of each row.
        shards: `ShardsOf.name` -> where they are.
        out: of the table.

    Raises:
        ConfigError: a setting that cannot work.
    """
    by_folder: dict[str, Row] = {}
    for row in rows:
        known = by_folder.setdefault(row.run_name, row)
        assert known.settings == row.settings, f"the rows {known.name} and {row.name} share runs, so their settings are the same"
        by_folder[row.run_name] = replace(known, stages=max(known.stages, row.stages))
    return [plan_run(table.budget, row, seed, shards, out) for seed in seeds for row in by_folder.values()]


def plan_run(budget: Budget, row: Row, seed: int, shards: dict[str, Path | str], out: Path) -> Run:
    """The run of one row and seed.

    Raises:
        ConfigError: a setting that cannot work.
    """
    assert row.shards is not None, "a row that is only published has no runs"
    dataset = row.shards.dataset
    settings = (*budget.settings[dataset], *row.settings)
    config = resolve_config(dataset, budget.recipes[dataset], {}, [*settings, f"seed={seed}"])
    return Run(
        name=f"{row.run_name}-s{seed}",
        config=config,
        recipe=budget.recipes[dataset],
        settings=settings,
        stages=row.stages,
        shards=shards.get(row.shards.name, out / "shards" / row.shards.name),
        out=out / "runs" / f"{row.run_name}-s{seed}",
    )


def seeds_on_disk(out: Path, row: Row) -> list[int]:
    """Seeds of which the row has a run folder, finished or not."""
    prefix = f"{row.run_name}-s"
    endings = [path.name.removeprefix(prefix) for path in (out / "runs").glob(f"{prefix}*") if path.is_dir()]
    return sorted(int(ending) for ending in endings if ending.isdecimal())


def is_of_table(run: Run) -> bool:
    """Whether the run on disk has the settings that the table has today, and its stage two, if it takes part, came of it by them."""
    try:
        asked = json.loads(to_json(run.config))
        asked["data"]["loader"] = saved_loader(run.out)
        require_same_config(read_json(run.out / CONFIG_FILE), asked, run.out)
        if run.stages == 2:
            require_own_stage_two(run)
    except ValueError:  # `UserError` too: damaged, or of another table
        return False
    return True


def require_own_stage_two(run: Run) -> None:
    """Raises `ConfigError` where the finished stage two of a run came of other weights than the run's, or of other settings."""
    require(is_stage_two(run.stage_two), f"{run.stage_two} holds a run that is no stage two; move it away")
    require_same_retraining(run.stage_two, run.config)
    if not started_from(run.stage_two, run.out, checkpoint_of_result(run.out)):
        anew = retraining_command(run.out, run.config.retrain)
        raise ConfigError(f"{run.stage_two} came of other weights than {run.out} has now; make it anew with: {anew}")


def read_record(run: Run) -> dict[str, Any]:
    """What `train` noted beside the run: {"wall_s", "commits", "hardware"}; empty where it did not come to that."""
    path = run.out / RECORD_FILE
    return read_json(path) if path.is_file() else {}
