"""Whose weights are a run's result: every command that starts from the run takes those that its summary reports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bce3s.cli import app
from bce3s.config import ModelConfig, RetrainConfig
from bce3s.launch import Launch, launch
from bce3s.losses import resolve_method
from bce3s.runlog import read_json, read_metrics
from bce3s.seeds import summary_of
from bce3s.train import Trainer
from pipelines.types import ConfigError, UserError
from tests.bce3s.train.runs import CONFIG, _StopAt, console, weights

SMALL = replace(CONFIG, epochs=2, model=ModelConfig(arch="resnet8-cifar", projection_dim=4), retrain=RetrainConfig(epochs=1))
BEST = "best_on_val_no_tta"


def selected_run(shards: Any, out: Path) -> Path:
    """Selected on val: the first of two epochs."""
    trainer = Trainer(replace(SMALL, select="val"), shards, out, console())

    def none_is_better_later() -> bool:
        if trainer.state.cursor.epoch == 1:
            trainer.state.cursor.best_accuracy = 200.0
        return False

    trainer._stop = _StopAt(none_is_better_later)
    trainer.fit()
    trainer.close()
    return out


def printed(*arguments: str) -> dict[str, Any]:
    """What a command prints with --json."""
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    figures: dict[str, Any] = json.loads(found.stdout)
    return figures


def refusal(*arguments: str) -> str:
    found = CliRunner().invoke(app, list(arguments))
    assert isinstance(found.exception, UserError), found.output
    return str(found.exception)


def test_commands_take_the_weights_that_the_summary_reports(make_shards: Any, tmp_path: Path) -> None:
    run = selected_run(make_shards(val=3), tmp_path / "run")
    summary, name = summary_of(run), str(run)
    assert (summary["headline"], summary[BEST]["epoch"]) == (BEST, 0)
    label, plain = next(iter(printed("evaluate", name).items()))
    assert label == "best epoch on val (1)"
    assert plain == json.loads(json.dumps({key: value for key, value in summary[BEST].items() if key != "epoch"}))
    assert next(iter(printed("evaluate", name, "--checkpoint", "last"))) == "last epoch (2)"
    assert "step-00000010.safetensors holds no moving average" in refusal("evaluate", name, "--average")
    started = ("retrain-classifier", name, "--device", "cpu")
    for options, file in (((), "best.safetensors"), (("--checkpoint", "last"), "step-00000010.safetensors")):
        printed(*started, *options, "--overwrite")
        assert read_json(run / "stage2-bce" / "environment.json")["stage_one"]["checkpoint"].endswith(file)
    # A stage two selects nothing.
    assert next(iter(printed("evaluate", str(run / "stage2-bce")))) == "stage two (bce), last epoch (1)"
    # The best epoch so far is not the result of a run that has not ended.
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("".join(line for line in log.splitlines(keepends=True) if '"summary"' not in line))
    assert "finish stage one with 'bce3s fast-train … --resume' first" in refusal(*started, "--overwrite")
    # Where it is lost, the last epoch stands in, as in the summary.
    (run / "best.safetensors").unlink()
    assert next(iter(printed("evaluate", name))) == "last epoch (2)"


@pytest.mark.parametrize("val", [3, 0])
def test_the_last_epoch_is_the_result_of_a_run_that_does_not_select(make_shards: Any, tmp_path: Path, val: int) -> None:
    trainer = Trainer(replace(SMALL, epochs=1), make_shards(val=val), tmp_path / "run", console())
    trainer.fit()
    trainer.close()
    assert next(iter(printed("evaluate", str(tmp_path / "run")))) == "last epoch (1)"
    split = "val" if val else "test"
    assert next(iter(printed("evaluate", str(tmp_path / "run"), "--checkpoint", "best"))) == f"best epoch on {split} (1)"


def test_another_selection_measures_finished_runs_again_and_trains_nothing(make_shards: Any, tmp_path: Path) -> None:
    shards, out = make_shards(val=3), tmp_path / "runs"

    def train_seeds(select: str, stages: int = 1) -> None:
        asked = Launch(shards=shards.root, out=out, resume=out.exists(), overwrite=False, seeds=(0, 1), stages=stages)
        launch(resolve_method(replace(SMALL, epochs=1, select=select)), asked)

    train_seeds("last")
    before = weights(out / "s1")
    for select, headline, file in (("val", BEST, "best.safetensors"), ("last", "last_epoch_no_tta", "step-00000005.safetensors")):
        train_seeds(select)
        assert all(torch.equal(value, weights(out / "s1")[name]) for name, value in before.items())
        combined = read_json(out / "seeds.json")
        assert (combined["headline"], next(iter(combined["figures"]))) == (headline, headline)
        assert combined["selected_by"] == ("all on val" if select == "val" else None)
        for seed in (0, 1):
            assert summary_of(out / f"s{seed}")["headline"] == headline
            assert [line["kind"] for line in read_metrics(out / f"s{seed}")].count("epoch") == 1
        # A stage two of the old result is nobody's to replace unasked; made of the new one, it stands.
        train_seeds(select, stages=2)
        for seed in (0, 1):
            facts = read_json(out / f"s{seed}" / "stage2-bce" / "environment.json")["stage_one"]
            assert Path(facts["checkpoint"]).name == file
        other = "last" if select == "val" else "val"
        with pytest.raises(ConfigError, match=f"stage2-bce was made with --select {select}, this command says {other}: give it without"):
            train_seeds(other, stages=2)
        for seed in (0, 1):
            shutil.rmtree(out / f"s{seed}" / "stage2-bce")
