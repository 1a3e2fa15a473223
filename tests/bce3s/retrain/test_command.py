"""Stage two as a user types it: alone, behind training, over seeds, stopped, killed, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from bce3s.cli import app
from bce3s.retrain.stage_two import StageTwo
from bce3s.runlog import read_metrics
from bce3s.seeds import summary_of
from pipelines.types import UserError
from tests.bce3s.retrain.stages import RETRAIN, stage_one_of, train_stage_one
from tests.bce3s.train.runs import console, wait_until
from tests.commands import begin, finish

FAST = ("--epochs", "1", "--device", "cpu")


def run(*arguments: str) -> Result:
    """A command in this process; a mistake is its exception, which `bce3s.cli` prints as one sentence."""
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def folder(make_shards: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two finished runs lie: "runs/one" with the normalised classifier, "runs/linear" with a linear one."""
    found = tmp_path_factory.mktemp("retrain")
    train_stage_one(make_shards(), found / "runs" / "one")
    train_stage_one(make_shards(), found / "runs" / "linear", "linear")
    return found


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(("name", "method"), [("one", "bce"), ("one", "lws"), ("linear", "tau-norm")])
def test_the_result_is_a_run_that_evaluate_repeats(folder: Path, name: str, method: str) -> None:
    found = run("retrain-classifier", f"runs/{name}", "--method", method, *FAST)
    assert found.exit_code == 0, found.output
    assert f"stage two ({method}), test split" in found.stdout
    again = run("evaluate", f"runs/{name}/stage2-{method}", "--json")
    assert again.exit_code == 0, again.output
    figures = json.loads(again.stdout)
    summary = read_metrics(folder / "runs" / name / f"stage2-{method}")[-1]
    assert next(iter(figures.values())) == json.loads(json.dumps(summary["last_epoch_no_tta"]))
    assert sorted(path.name for path in (folder / "runs" / name / f"stage2-{method}").iterdir()) == [
        *("checkpoints", "config.json", "environment.json", "metrics.jsonl")
    ]


def test_a_finished_stage_two_goes_only_when_asked(folder: Path) -> None:
    command = ("retrain-classifier", "runs/one", "--method", "crt", *FAST)
    assert run(*command).exit_code == 0
    assert str(run(*command).exception).startswith("runs/one/stage2-crt holds a finished stage two; add --overwrite")
    found = run(*command, "--overwrite", "--json", "--lr", "0.5", "--set", "retrain.batch_size=8")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["last_epoch_no_tta"]["num_images"] == 20
    saved = json.loads((folder / "runs" / "one" / "stage2-crt" / "config.json").read_text())["retrain"]
    assert (saved["learning_rate"], saved["batch_size"]) == (0.5, 8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent"], "absent is not a run folder"),
        (["runs/one", "--method", "tau-norm"], "does nothing to a normalized classifier"),
        (["runs/one", "--method", "madeup"], "unknown method 'madeup'; known: bce, crt, lws, tau-norm"),
        (["runs/one", "--batch-norm", "thawed"], "unknown batch_norm 'thawed'; known: frozen, updated"),
        (["runs/one", "--checkpoint", "first"], "unknown checkpoint 'first'; known: last, best"),
        (["runs/one", "--epochs", "0"], "epochs must be at least 1"),
        (["runs/one", "--lr", "-1"], "learning_rate cannot be negative"),
        (["runs/one", "--out", "runs"], "runs is there already and holds no stage two"),
        (["runs/one", "--out", "runs/linear", "--overwrite"], "runs/linear is there already and holds no stage two"),
        (["runs/one", "--out", "runs/one/config.json/x"], "config.json is no folder that can be written to"),
        (["runs/one", "--set", "epochs=3"], "--set epochs=3 is not of stage two"),
        (["runs/one", "--shards", "absent"], "no shards at absent"),
        (["runs/two"], "runs/two is a stage two already; name the folder of its stage one"),
        (["runs/half"], "runs/half has done 2 of 9 epochs; finish stage one"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(folder: Path, arguments: list[str], sentence: str) -> None:
    if arguments == ["runs/two"] and not (folder / "runs" / "two").exists():
        assert run("retrain-classifier", "runs/one", *FAST, "--out", "runs/two").exit_code == 0
    if arguments == ["runs/half"]:
        _half_done(folder)
    before = sorted(folder.rglob("*"))
    found = run("retrain-classifier", *arguments)
    assert isinstance(found.exception, UserError), found.output
    assert sentence in str(found.exception)
    assert sorted(folder.rglob("*")) == before


def _half_done(folder: Path) -> None:
    import torch

    from bce3s.checkpoint import load_checkpoint, save_checkpoint
    from bce3s.train import newest_checkpoint

    shutil.copytree(folder / "runs" / "one", folder / "runs" / "half", dirs_exist_ok=True)
    path = newest_checkpoint(folder / "runs" / "half")
    state = load_checkpoint(path, torch.device("cpu"))
    save_checkpoint(path, {**state, "config": json.dumps({**json.loads(state["config"]), "epochs": 9})})


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stage_two_that_is_killed_leaves_nothing_behind(folder: Path, tmp_path: Path, number: int, status: int) -> None:
    out, said = tmp_path / "two", tmp_path / "said.txt"
    command = ["retrain-classifier", "runs/one", "--batch-norm", "updated", "--epochs", "100000", "--device", "cpu", "--out", str(out)]
    process = begin(command, said, cwd=folder)
    wait_until(lambda: said.exists() and "epoch   2/" in said.read_text())
    assert process.pid is not None
    os.kill(process.pid, number)
    assert finish(process) == status, said.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["said.txt"]
    assert ("interrupted" in said.read_text()) == (number == signal.SIGINT)
    assert "Traceback" not in said.read_text()


def test_both_stages_of_every_seed_and_only_what_is_missing_after_a_stop(make_shards: Any, tmp_path: Path) -> None:
    out, said = tmp_path / "runs", tmp_path / "said.txt"
    command = [
        *("fast-train", "--dataset", "cifar10-lt", "--shards", str(make_shards().root), "--recipe", "cifar10lt_resnet20_40ep", *FAST),
        *("--arch", "resnet8-cifar", "--precision", "fp32", "--out", str(out), "--seeds", "0,1", "--stages", "2"),
        *("--set", "retrain.epochs=2"),
    ]
    assert finish(begin(command, said)) == 0, said.read_text()
    for expected in ("2 seeds", "stage two (bce), 2 seeds", "stage two (bce), test split"):
        assert expected in said.read_text()
    combined = json.loads((out / "seeds.json").read_text())
    values = [summary_of(out / f"s{seed}" / "stage2-bce")["last_epoch_no_tta"]["all"] for seed in (0, 1)]
    assert combined["stage_two"]["figures"]["last_epoch_no_tta"]["all"]["mean"] == pytest.approx(sum(values) / 2)
    # A continuation does what is not there, and that alone.
    kept = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    shutil.rmtree(out / "s1" / "stage2-bce")
    assert finish(begin([*command, "--resume"], said)) == 0, said.read_text()
    assert {path: path.read_bytes() for path in kept if "s1/stage2" not in str(path)} == {
        path: content for path, content in kept.items() if "s1/stage2" not in str(path)
    }
    assert summary_of(out / "s1" / "stage2-bce")["last_epoch_no_tta"]["all"] == values[1]
    # Other settings are no continuation.
    assert finish(begin([*command, "--resume", "--set", "retrain.learning_rate=0.5"], tmp_path / "other.txt")) == 2
    assert "was made with retrain.learning_rate=0.0001, this command says 0.5" in (tmp_path / "other.txt").read_text()
    # Stage one anew takes the stage two of the old one with it; stopped there, --resume goes on with stage two alone.
    slow = [*command, "--seeds", "0", "--set", "retrain.epochs=100000", "--set", "retrain.batch_norm=updated"]
    process = begin([*slow, "--overwrite"], tmp_path / "slow.txt")
    wait_until(lambda: (tmp_path / "slow.txt").exists() and "stage two, epoch   2/" in (tmp_path / "slow.txt").read_text())
    assert not (out / "s0" / "stage2-bce").exists()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 0, (tmp_path / "slow.txt").read_text()
    assert "stopped by SIGTERM after epoch 1, and saved; continue with: bce3s fast-train" in (tmp_path / "slow.txt").read_text()
    assert not (out / "s0" / "stage2-bce").exists()


def test_epochs_are_compared_by_logits_that_are_not_rounded(make_shards: Any, tmp_path: Path) -> None:
    """In bfloat16 the logits of the first class and the last would be equal, and the first, the largest, would win."""
    shards = make_shards(val=2)
    stage_one = stage_one_of(train_stage_one(shards, tmp_path / "run", "linear"), shards)
    stage_two = StageTwo(replace(stage_one, placement=replace(stage_one.placement, precision="bf16")), RETRAIN, console())
    stage_two._kept_features()
    classifier = stage_one.model.classifier
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([1.0, 0.9, 0.9, 1.001])[:, None].expand_as(classifier.weight))
        classifier.bias.zero_()
    kept = stage_two._selection_accuracy()
    assert kept.per_class == stage_two._evaluate("val")["plain"].per_class == (0.0, 0.0, 0.0, 100.0)
    stage_two._loaders.close()


def test_more_stages_than_there_are_is_a_sentence(make_shards: Any, tmp_path: Path) -> None:
    command = ("fast-train", "--dataset", "cifar10-lt", "--shards", str(make_shards().root), "--arch", "resnet8-cifar")
    for arguments, sentence in (
        (("--stages", "3"), "--stages takes 1 or 2, not 3"),
        (("--stages", "2", "--set", "retrain.method=tau-norm"), "tau-norm does nothing to a normalized classifier"),
    ):
        found = run(*command, *arguments, "--out", str(tmp_path / "run"))
        assert isinstance(found.exception, UserError)
        assert sentence in str(found.exception)
    assert list(tmp_path.iterdir()) == []
