"""What a preempted, crowded or broken machine does to a run: killed, asked to stop, out of disk, out of numbers."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.checkpoint import CheckpointFolder
from bce3s.config import CheckpointConfig
from bce3s.runlog import read_metrics
from bce3s.train import Trainer, TrainingError
from pipelines.format import ShardSet
from pipelines.types import Batch
from tests.bce3s.train.runs import CONFIG, assert_equal_states, console, train, wait_until, weights
from tests.commands import begin, finish

MakeCommand = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def command(make_shards: Any) -> MakeCommand:
    """A run of 18 short steps that saves at every one it can, on the small set."""
    shards: ShardSet = make_shards()

    def make(out: Path) -> list[str]:
        return [
            *("fast-train", "--dataset", "cifar10-lt", "--shards", str(shards.root), "--recipe", "cifar10lt_resnet20_40ep"),
            *("--epochs", "6", "--batch-size", "32", "--precision", "fp32", "--device", "cpu", "--loader", "resident"),
            *(
                "--checkpoint-every",
                "1steps",
                "--set",
                "data.num_threads=1",
                "--set",
                "data.image_size=16",
                "--set",
                "data.augment.crop=resized",
                "--out",
                str(out),
                "--resume",
            ),
        ]

    return make


@pytest.fixture(scope="module")
def whole(command: MakeCommand, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run and the seconds it took."""
    tmp_path = tmp_path_factory.mktemp("whole")
    began_s = time.monotonic()
    assert finish(begin(command(tmp_path / "whole"), tmp_path / "whole.txt")) == 0
    return tmp_path / "whole", time.monotonic() - began_s


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_changes_nothing(command: MakeCommand, whole: tuple[Path, float], tmp_path: Path, kills: int) -> None:
    """Runs that are killed at random moments of their life, continued by the same command, and killed again now and then."""
    reference, whole_s = whole
    draw = random.Random(kills)
    num_kills = num_runs = 0
    while num_kills < kills:
        num_runs += 1
        out, output = tmp_path / f"killed-{num_runs}", tmp_path / f"killed-{num_runs}.txt"
        status = None
        while status != 0:
            process = begin(command(out), output)
            # The first start of a run is always hunted, each further one half as likely; some end before the kill finds them.
            if status is None or draw.random() < 0.5:
                process.join(draw.uniform(0.0, whole_s))
                if process.exitcode is None:
                    assert process.pid is not None
                    os.kill(process.pid, signal.SIGKILL)
                    num_kills += 1
            status = finish(process)
            assert status in (0, -signal.SIGKILL), output.read_text()
        assert_equal_states(reference, out)
        assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_finishes_the_step_saves_and_prints_the_command_that_continues(
    command: MakeCommand, whole: tuple[Path, float], tmp_path: Path, number: signal.Signals
) -> None:
    out, output = tmp_path / "stopped", tmp_path / "stopped.txt"
    process = begin(command(out), output)
    wait_until(lambda: CheckpointFolder(out, keep=2).newest() is not None)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert finish(process) == 0, output.read_text()
    said = output.read_text()
    found = re.search(r"stopped by (\w+) after (.*), and saved; continue with: bce3s (.*)\n", said)
    assert found is not None, said
    assert found[1] == number.name
    assert "Traceback" not in said
    assert finish(begin(shlex.split(found[3]), output)) == 0, output.read_text()
    assert f"continuing after {found[2]}" in output.read_text()
    assert_equal_states(whole[0], out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB: room for a few checkpoints of the small network."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def before_each_step(trainer: Trainer, happening: Callable[[Batch], None]) -> None:
    """Lets something happen to the machine or the model just before the steps of a run."""
    schedule = trainer.step.schedule

    def happens_first(batch: Batch, num_steps: int) -> None:
        happening(batch)
        schedule(batch, num_steps)

    trainer.step.schedule = happens_first  # type: ignore[method-assign]


def _free_bytes(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def test_a_disk_that_fills_up_stops_no_training_and_costs_no_checkpoint(make_shards: Any, tmp_path: Path, small_disk: Path) -> None:
    """Full from the second epoch to the third: loud lines, the old checkpoint stands, and the run ends as if nothing had been."""
    shards, run, filler = make_shards(), small_disk / "run", small_disk / "filler"
    train(CONFIG, shards, tmp_path / "whole")
    told = console()
    trainer = Trainer(CONFIG, shards, run, told)
    stood: list[Path | None] = []

    def fill_and_empty(batch: Batch) -> None:
        if (batch.epoch, batch.step) == (1, 2):
            filler.write_bytes(bytes(_free_bytes(small_disk)))
        if (batch.epoch, batch.step) == (3, 2):
            stood.append(CheckpointFolder(run, keep=2).newest())
            filler.unlink()

    before_each_step(trainer, fill_and_empty)
    trainer.fit()
    trainer.close()
    said = told.file.getvalue()  # type: ignore[attr-defined]
    assert "NOT SAVED: " in said
    assert "what was there before still stands; training goes on" in said
    assert stood[0] is not None
    assert stood[0].name == "step-00000005.safetensors"
    assert_equal_states(tmp_path / "whole", run)
    assert [line["epoch"] for line in read_metrics(run) if line["kind"] == "epoch"] == [0, 1, 2, 3]


def test_a_run_that_cannot_save_its_end_fails(make_shards: Any, small_disk: Path) -> None:
    trainer = Trainer(CONFIG, make_shards(), small_disk / "run", console())

    def fill(batch: Batch) -> None:
        if (batch.epoch, batch.step) == (3, 1):
            (small_disk / "filler").write_bytes(bytes(_free_bytes(small_disk)))

    before_each_step(trainer, fill)
    with pytest.raises(TrainingError, match=r"could not be saved: cannot save .*: No space left .* mend that, then add --resume"):
        trainer.fit()
    trainer.close()


def test_a_loss_that_is_not_finite_names_the_step_and_its_samples_and_keeps_the_good_checkpoint(make_shards: Any, tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, make_shards(), tmp_path / "run", console())
    broken_ids: list[int] = []

    def break_weights(batch: Batch) -> None:
        if (batch.epoch, batch.step) == (1, 2):
            broken_ids.extend(batch.ids_S.tolist())
            with torch.no_grad():
                trainer.model.classifier.weight.fill_(float("nan"))

    before_each_step(trainer, break_weights)
    with pytest.raises(
        TrainingError, match=r"not finite from step 3 of epoch 2 on \(samples (.*) and 24 more.*step-00000005.* stands"
    ) as caught:
        trainer.fit()
    trainer.close()
    assert ", ".join(map(str, broken_ids[:8])) in str(caught.value)
    assert read_metrics(tmp_path / "run")[-1] == {"kind": "broken", "epoch": 1, "step": 2, "ids": broken_ids}
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values() if value.is_floating_point())


def test_weights_that_broke_are_never_saved_even_when_the_loss_was_not_read_yet(make_shards: Any, tmp_path: Path) -> None:
    """The log is read at the end of the epoch only, but saves are due at every step."""
    config = replace(CONFIG, log_every=1000, checkpoint=CheckpointConfig(every="1steps", keep=1))
    trainer = Trainer(config, make_shards(), tmp_path / "run", console())
    apply = trainer.step.apply

    def apply_and_break(batch: Batch) -> dict[str, torch.Tensor]:
        terms = apply(batch)
        if (batch.epoch, batch.step) == (1, 1):
            with torch.no_grad():
                trainer.model.classifier.weight[0, 0] = float("inf")
        return terms

    trainer.step.apply = apply_and_break  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="not finite from step 3 of epoch 2"):
        trainer.fit()
    trainer.close()
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values() if value.is_floating_point())
