"""The command line as a user types it: train, continue, evaluate, and one sentence for every mistake."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.loaders import LOADERS
from tests.commands import run

TOOLS = Path(__file__).resolve().parents[2] / "tools"
FAST = ["--recipe", "cifar10lt_resnet20_40ep", "--epochs", "1", "--precision", "fp32", "--device", "cpu"]


def assert_one_sentence(found: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert found.returncode != 0
    assert "Traceback" not in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert sentence in found.stderr


@pytest.fixture(scope="module")
def trained(make_shards: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished one-epoch run in its working folder, and its shards."""
    folder = tmp_path_factory.mktemp("cli")
    shards = make_shards(val=2)
    found = run("fast-train", "--dataset", "cifar10-lt", "--shards", str(shards.root), *FAST, "--out", "runs/one", cwd=folder)
    assert found.returncode == 0, found.stderr
    for expected in ("last epoch, flip TTA", "best epoch on val", "source images/s", "runs/one"):
        assert expected in found.stdout
    return folder, shards.root


def test_evaluate_repeats_the_last_epoch_of_the_run(trained: tuple[Path, Path]) -> None:
    folder, _ = trained
    found = run("evaluate", "runs/one", "--json", cwd=folder)
    assert found.returncode == 0, found.stderr
    figures = json.loads(found.stdout)
    lines = [json.loads(line) for line in (folder / "runs" / "one" / "metrics.jsonl").read_text().splitlines()]
    assert figures["last epoch (1)"] == json.loads(json.dumps(lines[-1]["last_epoch_no_tta"]))
    assert run("evaluate", "runs/one", "--split", "val", "--checkpoint", "best", cwd=folder).returncode == 0


def test_the_moving_average_is_evaluated_on_request(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, shards = trained
    assert_one_sentence(run("evaluate", "runs/one", "--average", cwd=folder), "holds no moving average; train with --set ema_decay=0.999")
    options = ("--set", "ema_decay=0.5", "--out", str(tmp_path / "averaged"))
    found = run("fast-train", "--dataset", "cifar10-lt", "--shards", str(shards), *FAST, *options, cwd=folder)
    assert "last epoch, average of weights" in found.stdout, found.stderr
    lines = [json.loads(line) for line in (tmp_path / "averaged" / "metrics.jsonl").read_text().splitlines()]
    figures = json.loads(run("evaluate", str(tmp_path / "averaged"), "--average", "--json", cwd=folder).stdout)
    found_all = figures["last epoch (1), average of weights"]["all"]
    assert found_all == lines[-1]["last_epoch_average_no_tta"]["all"]


def test_features_and_adjusted_logits_stand_beside_the_plain_row(trained: tuple[Path, Path]) -> None:
    folder, _ = trained
    figures = json.loads(run("evaluate", "runs/one", "--features", "--adjust-logits", "0.5", "--json", cwd=folder).stdout)
    lines = [json.loads(line) for line in (folder / "runs" / "one" / "metrics.jsonl").read_text().splitlines()]
    name = "last epoch (1)"
    assert list(figures) == [name, f"{name}, adjusted τ=0.5", f"{name}, flip TTA", f"{name}, flip TTA, adjusted τ=0.5", "features"]
    assert {name: figures["features"][name] for name in lines[-1]["last_epoch_features"]} == lines[-1]["last_epoch_features"]
    assert len(figures["features"]["compactness_K"]) == 4
    assert figures["features"]["split"] == "test"
    # The training images, as they are evaluated: all of them, and every class with a mean.
    found = run("evaluate", "runs/one", "--features", "--split", "train", "--checkpoint", "best", cwd=folder)
    assert found.returncode == 0, found.stderr
    for expected in ("best epoch on val (1)", "74 images, without augmentation", "sigmoid", "compactness", "NC1", "n/a"):
        assert expected in found.stdout, found.stdout


def test_evaluate_passes_over_a_damaged_checkpoint_and_says_so(trained: tuple[Path, Path]) -> None:
    folder, _ = trained
    damaged = folder / "runs" / "one" / "checkpoints" / "step-99999999.safetensors"
    damaged.write_text("x")
    found = run("evaluate", "runs/one", cwd=folder)
    damaged.unlink()
    assert found.returncode == 0, found.stderr
    assert found.stderr.startswith("warning: runs/one/checkpoints/step-99999999.safetensors is damaged")
    assert found.stderr.strip().endswith("taking the one before")


def test_print_config_is_json_and_trains_nothing(tmp_path: Path) -> None:
    found = run("fast-train", "--dataset", "demo", "--epochs", "3", "--set", "optimizer.momentum=0.8", "--print-config", cwd=tmp_path)
    config = json.loads(found.stdout)
    assert (config["epochs"], config["optimizer"]["momentum"], config["data"]["loader"]) == (3, 0.8, "dali")
    assert list(tmp_path.iterdir()) == []


def test_print_config_says_what_profile_and_stage_two_would_do(trained: tuple[Path, Path]) -> None:
    folder, _ = trained
    before = sorted(folder.rglob("*"))
    profiled = json.loads(run("profile", "--dataset", "demo", "--batch-size", "8", "--print-config", cwd=folder).stdout)
    assert (profiled["dataset"], profiled["data"]["batch_size"], profiled["loss"]["name"]) == ("demo", 8, "bce3s")
    second = json.loads(run("retrain-classifier", "runs/one", "--method", "crt", "--lr", "0.5", "--print-config", cwd=folder).stdout)
    assert (second["retrain"]["method"], second["retrain"]["learning_rate"], second["dataset"]) == ("crt", 0.5, "cifar10-lt")
    assert sorted(folder.rglob("*")) == before


def test_quiet_leaves_the_result(trained: tuple[Path, Path]) -> None:
    folder, shards = trained
    evaluated = run("evaluate", "runs/one", "-q", cwd=folder)
    assert (evaluated.stdout, evaluated.stderr) == (run("evaluate", "runs/one", cwd=folder).stdout, "")
    command = ("retrain-classifier", "runs/one", "--epochs", "1", "--overwrite", "--out", "second")
    loud, quiet = run(*command, cwd=folder), run(*command, "--quiet", cwd=folder)
    assert "stage two (bce)" in quiet.stdout
    assert loud.stdout.endswith(quiet.stdout)
    assert len(loud.stdout) > len(quiet.stdout)
    for options in ([], ["-q"]):
        assert "images in" in run(str(shards), *options, cwd=folder, program=str(TOOLS / "verify_shards.py")).stdout
    photos = folder / "photos"
    for number in range(8):
        place = photos / ("ant", "bee")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place)
    made = run("--dataset", "folder", "--source", "photos", "--out", "made", "-q", cwd=folder, program=str(TOOLS / "make_shards.py"))
    assert (made.stdout, made.stderr) == ("shards: made\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dataset", "imagenet"], "unknown dataset 'imagenet'; known: demo, folder, cifar10-lt, cifar100-lt"),
        (["--dataset", "demo", "--recipe", "fastest"], "unknown recipe 'fastest'; known: demo_resnet20_12ep"),
        (["--dataset", "demo", "--loader", "torch"], "unknown loader 'torch'; known: auto, " + ", ".join(LOADERS)),
        (["--dataset", "demo", "--shards", "absent"], "no shards at absent"),
        (["--dataset", "demo"], "no shards at shards/demo"),
        (["--dataset", "demo", "--set", "lr=1"], "unknown setting 'lr'"),
        (["--dataset", "demo", "--epochs", "0"], "epochs must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_sentence(run("fast-train", *arguments, cwd=tmp_path), sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "madeup"], "unknown method 'madeup'; known: bce3s, bce, ce"),
        (["--arch", "vgg"], "unknown arch 'vgg'; known: resnet8-cifar"),
        (["--precision", "fp16"], "precision fp16 needs a GPU"),
        (["--device", "cuda"], "sees no CUDA device"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--set", "model.pretrained=absent.pth"], "absent.pth"),
        (["--dataset", "demo"], "holds data set 'cifar10-lt', not 'demo'"),
        (["--out", "runs/one"], "runs/one holds a run already; add --resume"),
        (["--out", "runs/one", "--resume", "--overwrite"], "give one of them"),
        (["--out", "runs/one/config.json/x"], "cannot write to"),
        (["--out", "runs/one", "--resume", "--seed", "3"], "was trained with seed=0, this command says 3"),
    ],
)
def test_a_mistake_beside_real_shards_is_one_sentence(trained: tuple[Path, Path], arguments: list[str], sentence: str) -> None:
    folder, shards = trained
    if "cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has the device that the sentence says is missing")
    command = ["fast-train", "--dataset", "cifar10-lt", "--shards", str(shards), *FAST, "--out", "runs/mistake", *arguments]
    assert_one_sentence(run(*command, cwd=folder), sentence)
    assert not (folder / "runs" / "mistake").exists()


def test_resume_of_a_checkpoint_of_another_dataset_is_one_sentence(trained: tuple[Path, Path], make_shards: Any) -> None:
    folder, _ = trained
    other = make_shards(name="demo")
    found = run("fast-train", "--dataset", "demo", "--shards", str(other.root), *FAST, "--out", "runs/one", "--resume", cwd=folder)
    assert_one_sentence(found, "was trained on 'cifar10-lt'")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent"], "absent is not a run folder"),
        (["runs/one", "--shards", "absent"], "no shards at absent"),
        (["runs/one", "--split", "all"], "unknown split 'all'; known: train, val, test"),
        (["runs/one", "--adjust-logits", "-1"], "--adjust-logits takes a τ from 0 on, such as 1, not -1.0"),
        (["runs/one", "--checkpoint", "first"], "unknown checkpoint 'first'; known: last, best"),
    ],
)
def test_a_mistake_in_evaluate_is_one_sentence(trained: tuple[Path, Path], arguments: list[str], sentence: str) -> None:
    assert_one_sentence(run("evaluate", *arguments, cwd=trained[0]), sentence)
