"""What a user sees when shards are damaged under a training run: the sample or the shard by name, and the run goes on or stops as asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.format import open_shards

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-W", "error", "-m", "bce3s.cli", "fast-train", "--dataset", "cifar10-lt", "--loader", "dali", "--device", "cpu"]
SMALL = ["--recipe", "cifar10lt_resnet20_40ep", "--precision", "fp32", "--batch-size", "16", "--set", "data.augment.crop=resized"]


@pytest.fixture
def shards(make_shards: Any, tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    shutil.copytree(make_shards(size=(48, 48), extension="jpg").root, root)
    return root


def start(shards: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*COMMAND, *SMALL, "--shards", str(shards), "--out", str(shards.parent / "run"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def damage_sample(shards: Path, sample_id: int) -> None:
    split = open_shards(shards).split("train")
    with split.paths[int(split.shards_N[sample_id])].open("r+b") as tar:
        tar.seek(int(split.offsets_N[sample_id]) + int(split.sizes_N[sample_id]) // 2)
        tar.write(bytes(int(split.sizes_N[sample_id]) // 2 + 1))


def test_a_damaged_sample_stops_training_by_name_or_is_skipped_by_name(shards: Path) -> None:
    damage_sample(shards, 7)
    stopped = start(shards, "--epochs", "1")
    _, error = stopped.communicate(timeout=120)
    assert stopped.returncode == 2
    assert len(error.strip().splitlines()) == 1, error
    assert error.startswith("error: sample 00000007 of ")
    assert "does not decode" in error
    skipped = start(shards, "--epochs", "1", "--on-error", "skip")
    output, error = skipped.communicate(timeout=120)
    assert skipped.returncode == 0, error
    assert "last epoch" in output
    assert (output + error).count("sample 00000007 of ") == 1
    assert "training goes on with another image of the class in its place" in output + error


def test_a_shard_cut_short_under_a_running_training_is_one_sentence(shards: Path) -> None:
    training = start(shards, "--epochs", "500")
    checkpoints = shards.parent / "run" / "checkpoints"
    try:
        while not list(checkpoints.glob("step-*.safetensors")):
            assert training.poll() is None, training.communicate()
            time.sleep(0.05)
        for tar in shards.glob("train-*.tar"):
            with tar.open("r+b") as file:
                file.truncate(512)
        _, error = training.communicate(timeout=60)
    finally:
        training.kill()
    # By the guard, which names the shard, or by the handler of the bus error if a decoder was just reading there.
    assert training.returncode == 2
    assert len(error.strip().splitlines()) == 1, error
    assert error.strip().startswith("error: ")
    assert "was cut short" in error
    assert "--resume" in error
    assert list(checkpoints.glob("step-*.safetensors"))
