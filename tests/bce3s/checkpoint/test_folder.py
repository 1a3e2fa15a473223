"""A run's newest checkpoints: which stay, which is loaded, and what a kill at any moment leaves."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.checkpoint import CheckpointError, CheckpointFolder, CheckpointWriter, load_checkpoint

CPU = torch.device("cpu")


def state_of(step: int, size: int = 8) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.full((size,), float(step))}, "momentum": [torch.full((size,), -float(step))]}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


class TestRotation:
    def test_the_newest_stay(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path / "run", keep=2)
        assert folder.newest() is None
        assert folder.load_newest(CPU) is None
        assert list(tmp_path.iterdir()) == []  # to look changes nothing
        for step in (0, 500, 99_999_999, 100_000_000):
            folder.save(step, state_of(step))
        assert names(tmp_path / "run") == ["checkpoints/step-100000000.safetensors", "checkpoints/step-99999999.safetensors"]
        assert folder.newest() == tmp_path / "run/checkpoints/step-100000000.safetensors"
        loaded = folder.load_newest(CPU)
        assert loaded is not None
        assert (loaded.state["step"], loaded.path, loaded.skipped) == (100_000_000, folder.newest(), ())

    def test_other_files_are_not_touched(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, keep=1)
        (tmp_path / "checkpoints").mkdir()
        others = ["checkpoints/step-1.safetensors", "checkpoints/step-00000009.safetensors.bak", "checkpoints/notes", "a.partial"]
        for name in others:
            (tmp_path / name).write_bytes(b"mine")
        folder.save(3, state_of(3))
        folder.save(4, state_of(4))
        assert names(tmp_path) == sorted([*others, "checkpoints/step-00000004.safetensors"])
        folder.clear()
        assert names(tmp_path) == sorted(others)
        assert folder.load_newest(CPU) is None

    def test_what_cannot_be_saved_deletes_nothing(self, tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
        disk = small_disk("size=3m")
        folder = CheckpointFolder(disk, keep=1)
        folder.save(1, state_of(1))
        with pytest.raises(CheckpointError, match=r"cannot save .*step-00000002\.safetensors: No space left on device"):
            folder.save(2, state_of(2, 1 << 20))
        assert names(disk) == ["checkpoints/step-00000001.safetensors"]
        small_disk("remount,ro")
        for attempt in (lambda: CheckpointFolder(disk, keep=1).save(2, state_of(2)), lambda: CheckpointFolder(disk / "b", 1).save(2, {})):
            with pytest.raises(CheckpointError, match=r"cannot save .*: Read-only file system"):
                attempt()
        with pytest.raises(CheckpointError, match=r"cannot empty .*checkpoints: Read-only file system"):
            folder.clear()
        loaded = folder.load_newest(CPU)
        assert loaded is not None
        assert loaded.state["step"] == 1

    def test_what_is_damaged_does_not_push_out_what_is_whole(self, tmp_path: Path) -> None:
        """Resumed from step 100 because 200 was damaged: the save at 150 is the newest from then on."""
        folder = CheckpointFolder(tmp_path, keep=1)
        folder.save(200, state_of(200))
        cut(tmp_path / "checkpoints/step-00000200.safetensors")
        folder.save(150, state_of(150))
        assert names(tmp_path) == ["checkpoints/step-00000150.safetensors"]

    def test_an_empty_run_is_cleared(self, tmp_path: Path) -> None:
        CheckpointFolder(tmp_path / "run", keep=1).clear()
        assert list(tmp_path.iterdir()) == []


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> CheckpointFolder:
        folder = CheckpointFolder(tmp_path, keep=3)
        for step in (1, 2, 3):
            folder.save(step, state_of(step))
        return folder

    def test_the_one_before_is_loaded_and_the_damage_told(self, folder: CheckpointFolder, tmp_path: Path) -> None:
        for step in (3, 2):
            cut(tmp_path / f"checkpoints/step-{step:08d}.safetensors")
        loaded = folder.load_newest(CPU)
        assert loaded is not None
        assert loaded.state["step"] == 1
        assert [sentence.partition(" is damaged")[0] for sentence in loaded.skipped] == [
            str(tmp_path / f"checkpoints/step-{step:08d}.safetensors") for step in (3, 2)
        ]

    def test_all_damaged_is_one_sentence(self, folder: CheckpointFolder, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            cut(tmp_path / f"checkpoints/step-{step:08d}.safetensors")
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*checkpoints can be loaded: .*0003.* is damaged.*; .*0002.*; .*0001"):
            folder.load_newest(CPU)


def save_for_ever(run: Path) -> None:
    """As a training does: alternately beside it and at its end."""
    folder = CheckpointFolder(run, keep=2)
    writer = CheckpointWriter(folder)
    state = state_of(0, 1 << 19)
    for step in range(1, 1_000_000):
        state["step"] = step
        state["model"]["w"].fill_(step)
        state["momentum"][0].fill_(-step)
        if step % 3:
            assert writer.submit(step, state, {run / "best.safetensors": state})
            writer.wait()
        else:
            folder.save(step, state)


def assert_whole(state: dict[str, Any]) -> None:
    assert torch.equal(state["model"]["w"], torch.full((1 << 19,), float(state["step"])))
    assert torch.equal(state["momentum"][0], torch.full((1 << 19,), -float(state["step"])))


def kill_and_look(run: Path, delay_s: float) -> bool:
    """Kills a process that saves so long after its first checkpoint; whether it was amid a file."""
    process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(run,), daemon=True)
    process.start()
    folder = CheckpointFolder(run, keep=2)
    deadline_s = time.monotonic() + 30
    try:
        while folder.newest() is None:
            assert process.is_alive()
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        time.sleep(delay_s)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    loaded = folder.load_newest(CPU)
    assert loaded is not None
    assert (loaded.path, loaded.skipped) == (folder.newest(), ())
    assert_whole(loaded.state)
    assert_whole(load_checkpoint(run / "best.safetensors", CPU))
    left = [name for name in names(run) if name.endswith(".partial")]
    next_step = loaded.state["step"] + 1
    folder.save(next_step, state_of(next_step))
    assert not [name for name in names(run) if name.endswith(".partial")]
    assert 2 <= len(names(run)) <= 3  # the best and the newest two
    return bool(left)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and later on every fork
class TestKill:
    def test_the_newest_is_whole(self, tmp_path: Path) -> None:
        for trial, delay_s in enumerate((0.0, 0.013, 0.041)):
            kill_and_look(tmp_path / str(trial), delay_s)

    @pytest.mark.slow
    def test_the_newest_is_whole_whenever_it_comes(self, tmp_path: Path) -> None:
        rng = random.Random(0)
        amid = [kill_and_look(tmp_path / str(trial), rng.uniform(0, 0.2)) for trial in range(20)]
        assert any(amid), "every kill fell between two files: the trials prove nothing"

    def test_half_written_files_go_with_the_next_save_and_not_with_a_look(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").mkdir()
        leftovers = ["best.safetensors.partial", "checkpoints/step-00000009.safetensors.partial"]
        for name in leftovers:
            (tmp_path / name).write_bytes(b"half")
        folder = CheckpointFolder(tmp_path, keep=1)
        assert folder.load_newest(CPU) is None  # these may be another process's, which is at it right now
        assert names(tmp_path) == leftovers
        folder.save(1, state_of(1))
        assert names(tmp_path) == ["checkpoints/step-00000001.safetensors"]


def rotate_for_ever(run: Path) -> None:
    folder = CheckpointFolder(run, keep=1)
    for step in range(1, 1_000_000):
        folder.save(step, state_of(step))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_looking_while_another_process_rotates(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(0, state_of(0))
    process = multiprocessing.get_context("fork").Process(target=rotate_for_ever, args=(tmp_path,), daemon=True)
    process.start()
    try:
        found: list[int] = []
        deadline_s = time.monotonic() + 30
        while len(found) < 200 or found[-1] < 5:
            assert process.is_alive()
            assert time.monotonic() < deadline_s
            loaded = folder.load_newest(CPU)
            if loaded is not None:
                assert loaded.skipped == ()
                found.append(loaded.state["step"])
    finally:
        process.kill()
        process.join()
    assert found == sorted(found)
