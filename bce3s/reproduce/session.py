"""One `bce3s reproduce`: shards, runs, and the table on disk after each of them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from bce3s.checkpoint import CheckpointFolder
from bce3s.device import resolve_device
from bce3s.interrupt import StopRequest
from bce3s.metrics import format_percent
from bce3s.reproduce.claims import claim_sentence
from bce3s.reproduce.collect import collect
from bce3s.reproduce.figures import figures_of
from bce3s.reproduce.grid import LAST, Row, Table
from bce3s.reproduce.page import counted, headline_cells, page
from bce3s.reproduce.runs import Run, plan_runs, require_own_stage_two
from bce3s.reproduce.shards import find_shards
from bce3s.reproduce.train import RunFailedError, train_beside, train_here
from bce3s.seeds import GROUPS
from bce3s.train import require_same_record
from pipelines.durable import write_atomically
from pipelines.format import ShardSet
from pipelines.types import ShardError


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for.

    Args:
        table: to be made.
        rows: of it, to be trained.
        seeds: one run each a row.
        out: folder of the table, its shards and runs.
        source, shards: where the data comes from; see `find_shards`.
        jobs: runs at a time.
        device: "auto" chooses.
        arguments: of the command line, for the record.
    """

    table: Table
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    out: Path
    source: Path | None
    shards: Path | None
    jobs: int
    device: str
    arguments: tuple[str, ...]


def reproduce_table(asked: Asked, console: Console) -> dict[str, Any]:
    """Trains what is missing, writes the table after every run, and returns what its JSON holds.

    Raises:
        UserError: what the user can mend; the first run that failed among it, after the others are done.
    """
    session = _Session(asked, console)
    session.train()
    return session.write()


class _Session:
    """The runs of one command."""

    def __init__(self, asked: Asked, console: Console) -> None:
        """Finds or makes the shards, and checks every run before the first one trains."""
        self.asked, self.console = asked, console
        resolve_device(asked.device)
        wanted = {row.shards.name: row.shards for row in asked.rows if row.shards is not None}
        found = {name: find_shards(each, asked.source, asked.shards, asked.out, console) for name, each in wanted.items()}
        self.shards: dict[str, Path | str] = {name: opened.root for name, opened in found.items()}
        planned = plan_runs(asked.table, asked.rows, asked.seeds, self.shards, asked.out)
        self.runs = [replace(run, config=replace(run.config, device=asked.device)) for run in planned]
        by_place = {opened.root: opened for opened in found.values()}
        for run in self.runs:
            _require_continuable(run, by_place[run.shards])
        self._num_left = sum(not run.finished for run in self.runs)
        self._begun_s: dict[str, float] = {}
        self._took_s: list[float] = []

    def train(self) -> None:
        """What is missing, until it is done or somebody asks to stop."""
        asked, waiting = self.asked, [run for run in self.runs if not run.finished]
        self._say(f"{asked.table.name}: {len(self.runs)} runs, {len(self.runs) - len(waiting)} finished before; in {asked.out}")
        self.write()
        with StopRequest() as stop:
            if asked.jobs > 1:
                with self.console.status("") as status:
                    failed = train_beside(
                        waiting, asked.jobs, stop, self._starts, self._ends, lambda going: status.update(self._state(going))
                    )
            else:
                failed = train_here(waiting, stop, self._starts, self._ends)
        self._report(failed, stop)

    def write(self) -> dict[str, Any]:
        """TABLE.json and TABLE.md, each whole or as it was; returns what the former holds."""
        asked, out = self.asked, self.asked.out
        record = collect(asked.table, out, self.shards, asked.seeds, asked.device, asked.arguments)
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / f"{asked.table.name}.json", (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
            write_atomically(out / f"{asked.table.name}.md", page(record).encode())
        except OSError as error:
            raise ShardError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error
        return record

    def _report(self, failed: list[str], stop: StopRequest) -> None:
        record = self.write()
        self.console.print(_shown(record))
        known = [claim for claim in record["claims"] if claim["interval"] is not None]
        for claim in known:
            self._say(claim_sentence(claim))
        if len(known) < len(record["claims"]):
            self._say(f"{len(record['claims']) - len(known)} of {len(record['claims'])} claims are not decided for want of runs")
        self._say(f"table: {self.asked.out / self.asked.table.name}.md   and .json beside it")
        left = sum(not run.finished for run in self.runs)
        if failed:
            more = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
            raise RunFailedError(f"{failed[0]}{more}; {left} of {len(self.runs)} runs are not finished, the same command tries them again")
        if left:
            self._say(f"stopped by {stop.name or 'a signal'}; {left} of {len(self.runs)} runs are not finished, the same command goes on")

    def _starts(self, run: Run) -> None:
        self._begun_s[run.name] = time.monotonic()
        number = self.runs.index(run) + 1
        self._say(f"run {number} of {len(self.runs)}: {run.name}{self._left()}")

    def _ends(self, run: Run) -> None:
        self._num_left -= 1
        self._took_s.append(time.monotonic() - self._begun_s[run.name])
        last = figures_of(run)[LAST]
        shown = ", ".join(f"{group} {format_percent(last[group])}" for group in GROUPS)
        self._say(f"{run.name} is finished after {_duration(self._took_s[-1])}: {shown}")
        self.write()

    def _left(self) -> str:
        """About how long the rest takes, once a run is over; ', about 0:12:30 left'."""
        if not self._took_s:
            return ""
        return f", about {_duration(self._num_left * sum(self._took_s) / len(self._took_s) / self.asked.jobs)} left"

    def _state(self, going: Sequence[str]) -> str:
        """Asked several times a second, so no file is read for it."""
        return f"{len(self.runs) - self._num_left} of {len(self.runs)} runs finished; training {', '.join(going)}{self._left()}"

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def _require_continuable(run: Run, shards: ShardSet) -> None:
    """Raises `ConfigError` where the run folder holds a run of other settings or shards, or a stage two of others."""
    if CheckpointFolder(run.out, run.config.checkpoint.keep).newest() is not None:
        require_same_record(run.out, run.config, shards)
    if run.stages == 2 and run.finished:
        require_own_stage_two(run)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _shown(record: dict[str, Any]) -> RichTable:
    """The headline for a terminal."""
    caption = "mean ± sample standard deviation over n seeds; last epoch, no TTA, unless the page says otherwise"
    table = RichTable(title=record["title"], title_justify="left", caption=caption, caption_justify="left")
    table.add_column("top-1, %")
    for name in (*GROUPS, "n", "published"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in record["rows"]:
        published = "–" if row["published"] is None else format_percent(row["published"]["all"])
        overall, *groups = headline_cells(row)
        # Of the groups the means alone, or a terminal of 80 columns breaks every cell.
        table.add_row(row["title"], overall, *(cell.partition(" ±")[0] for cell in groups), counted(row), published)
    return table
