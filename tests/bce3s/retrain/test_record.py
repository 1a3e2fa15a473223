"""Whose settings a stage two has, which one a command may replace, and what it says where it may not."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bce3s.checkpoint import CheckpointFolder
from bce3s.cli import app
from bce3s.config import RetrainConfig, TrainConfig
from bce3s.launch import Launch, launch
from bce3s.recipes import RECIPES
from bce3s.train import newest_checkpoint
from pipelines.format import ShardSet
from pipelines.types import ConfigError, UserError
from tests.bce3s.retrain.stages import STAGE_ONE
from tests.bce3s.train.runs import train


@pytest.fixture(scope="module")
def shards(make_shards: Any) -> ShardSet:
    found: ShardSet = make_shards()
    return found


@pytest.fixture(scope="module")
def trained(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Callable[[RetrainConfig], Path]:
    """A finished stage one whose config says this of stage two: a copy that the test may change."""
    runs: dict[RetrainConfig, Path] = {}

    def make(retrain: RetrainConfig) -> Path:
        if retrain not in runs:
            runs[retrain] = tmp_path_factory.mktemp("stage-one") / "run"
            train(replace(STAGE_ONE, retrain=retrain), shards, runs[retrain])
        return Path(shutil.copytree(runs[retrain], tmp_path_factory.mktemp("copy") / "run"))

    return make


def retrained(run: Path, *arguments: str) -> dict[str, Any]:
    """What the config of a stage two says of itself."""
    method = arguments[arguments.index("--method") + 1] if "--method" in arguments else "bce"
    found = CliRunner().invoke(app, ["retrain-classifier", str(run), *arguments, "--epochs", "1", "--overwrite"])
    assert found.exit_code == 0, found.output
    saved: dict[str, Any] = json.loads((run / f"stage2-{method}" / "config.json").read_text())["retrain"]
    return saved


def rate_and_decay(saved: dict[str, Any]) -> tuple[float, float]:
    return saved["learning_rate"], saved["weight_decay"]


def test_a_method_has_its_own_rate_on_a_run_of_a_recipe(trained: Callable[[RetrainConfig], Path]) -> None:
    run = trained(RECIPES["cifar10lt_resnet20_40ep"]().retrain)
    assert rate_and_decay(retrained(run)) == (1e-4, 0.0)
    assert rate_and_decay(retrained(run, "--method", "crt")) == (pytest.approx(0.025), 5e-4)
    assert rate_and_decay(retrained(run, "--method", "lws", "--set", "retrain.batch_size=128")) == (pytest.approx(0.05), 5e-4)


def test_a_rate_that_was_saved_for_one_method_is_not_taken_over_by_another(trained: Callable[[RetrainConfig], Path]) -> None:
    run = trained(RetrainConfig(learning_rate=3e-4, weight_decay=0.0))
    assert rate_and_decay(retrained(run)) == (3e-4, 0.0)
    assert rate_and_decay(retrained(run, "--method", "crt")) == (pytest.approx(0.025), 5e-4)
    assert rate_and_decay(retrained(run, "--method", "crt", "--lr", "0.3")) == (0.3, 5e-4)
    given = ("--set", "retrain.learning_rate=0.4", "--set", "retrain.weight_decay=0.0")
    assert rate_and_decay(retrained(run, "--method", "crt", *given)) == (0.4, 0.0)


def go_on(config: TrainConfig, shards: ShardSet, run: Path) -> None:
    """`fast-train --stages 2 --resume`."""
    launch(config, Launch(shards=shards.root, out=run, resume=True, overwrite=False, stages=2))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--seed", "7"), "stage2-bce was made with seed=7, this command says 0; use the same, or make it anew with: bce3s retrain-c"),
        (("--checkpoint", "best"), "stage2-bce was made from the best checkpoint, this command takes the last one; use the same, or"),
        (("--set", "data.batch_size=8"), "stage2-bce was made with data.batch_size=8, this command says 16; use the same, or make"),
        (("--lr", "0.5"), "stage2-bce was made with retrain.learning_rate=0.5, this command says 0.0001; use the same, or make"),
    ],
)
def test_a_stage_two_that_somebody_made_otherwise_is_never_replaced(
    trained: Callable[[RetrainConfig], Path], shards: ShardSet, arguments: tuple[str, ...], sentence: str
) -> None:
    run = trained(RetrainConfig(epochs=1))
    retrained(run, *arguments)
    before = contents(run)
    with pytest.raises(ConfigError) as raised:
        go_on(replace(STAGE_ONE, retrain=RetrainConfig(epochs=1)), shards, run)
    assert sentence in str(raised.value)
    assert contents(run) == before


def test_the_command_that_is_suggested_leads_out(
    trained: Callable[[RetrainConfig], Path], shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(RetrainConfig(epochs=1))
    asked = replace(STAGE_ONE, retrain=RetrainConfig(method="crt", epochs=2, batch_size=32, learning_rate=0.3))
    retrained(run, "--method", "crt")
    with pytest.raises(ConfigError) as raised:
        go_on(asked, shards, run)
    command = shlex.split(str(raised.value).partition("anew with: ")[2])
    assert command[:5] == ["bce3s", "retrain-classifier", str(run), "--method", "crt"]
    settings = {command[number + 1] for number, part in enumerate(command) if part == "--set"}
    assert settings == {"retrain.epochs=2", "retrain.batch_size=32", "retrain.learning_rate=0.3"}
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    before = contents(run)
    go_on(asked, shards, run)
    assert "both stages are finished" in capsys.readouterr().out
    assert contents(run) == before


def test_a_stage_two_of_this_form_is_made_anew_where_the_weights_are_others(
    trained: Callable[[RetrainConfig], Path], shards: ShardSet
) -> None:
    config = replace(STAGE_ONE, retrain=RetrainConfig(epochs=1))
    run = trained(config.retrain)
    go_on(config, shards, run)
    record = run / "stage2-bce" / "environment.json"
    said = json.loads(record.read_text())
    record.write_text(json.dumps({**said, "stage_one": {**said["stage_one"], "crc32": "00000000"}}))
    go_on(config, shards, run)
    assert json.loads(record.read_text())["stage_one"] == said["stage_one"]


def test_a_damaged_checkpoint_that_is_passed_over_is_said(
    trained: Callable[[RetrainConfig], Path], shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(STAGE_ONE, retrain=RetrainConfig(epochs=1))
    run = trained(config.retrain)
    newest = newest_checkpoint(run)
    damaged = newest.with_name(newest.name.replace(newest.stem, f"{newest.stem[:-1]}9"))
    damaged.write_bytes(b"no checkpoint")
    assert CheckpointFolder(run, keep=2).newest() == damaged
    go_on(config, shards, run)
    said = " ".join(capsys.readouterr().out.split())
    assert f"warning: {damaged}" in said
    assert "; taking the one before" in said


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_no_checkpoint_of_an_unfinished_run_is_taken(shards: ShardSet, tmp_path: Path, checkpoint: str) -> None:
    train(STAGE_ONE, shards, tmp_path / "run", stop_at=lambda trainer: trainer.state.cursor.epoch == 1)
    sentence = "has done 1 of 2 epochs; finish stage one with" if checkpoint == "last" else "run has not ended; finish stage one with"
    assert (tmp_path / "run" / "best.safetensors").is_file()
    found = CliRunner().invoke(app, ["retrain-classifier", str(tmp_path / "run"), "--checkpoint", checkpoint])
    assert isinstance(found.exception, UserError)
    assert sentence in str(found.exception)
