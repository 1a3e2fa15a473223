"""Saving beside the training: what is saved is what was submitted, what fails is told, and the training never waits for the disk.

A pipe in the place of a file's temporary holds the thread in the middle of its work until the test reads it, which is how long a slow
disk would take.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.checkpoint import CheckpointFolder, CheckpointWriter, load_checkpoint

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


def state_of(step: int, size: int = 1000) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.full((size,), float(step)), "n": torch.tensor(step)}}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run", keep=2)


@pytest.fixture
def writer(folder: CheckpointFolder) -> Iterator[CheckpointWriter]:
    writer = CheckpointWriter(folder)
    yield writer
    writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


@pytest.fixture
def slow_file(tmp_path: Path) -> Iterator[Path]:
    """A path whose saving does not come to its end before its `.partial` is read; then the save fails, as a pipe is no file."""
    pipe = tmp_path / "slow.partial"
    os.mkfifo(pipe)
    yield tmp_path / "slow"
    if pipe.exists():  # the test failed before it read: lets the thread go
        os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))


def read_slow(path: Path) -> bytes:
    pipe = os.open(path.with_name(f"{path.name}.partial"), os.O_RDONLY | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(pipe)
    content = b""
    try:
        while poll.poll(20_000):  # ms; a pipe nobody writes to would else be waited for for ever
            piece = os.read(pipe, 1 << 16)
            if not piece:
                return content
            content += piece
    finally:
        os.close(pipe)
    raise AssertionError(f"nobody writes {path}")


def steps(folder: CheckpointFolder) -> list[str]:
    newest = folder.newest()
    return sorted(path.name for path in newest.parent.iterdir()) if newest else []


def test_saves_and_rotates(writer: CheckpointWriter, folder: CheckpointFolder) -> None:
    for step in (1, 2, 3):
        assert writer.submit(step, state_of(step))
        writer.wait()
        assert not writer.busy
    assert writer.failures() == []
    assert steps(folder) == ["step-00000002.safetensors", "step-00000003.safetensors"]
    loaded = folder.load_newest(CPU)
    assert loaded is not None
    assert loaded.state["step"] == loaded.state["model"]["n"] == 3


def test_what_is_saved_is_what_was_submitted(writer: CheckpointWriter, folder: CheckpointFolder, slow_file: Path, tmp_path: Path) -> None:
    """For the step's file and those with it; the training goes on before a single byte is written."""
    state = state_of(1)
    best = {"w": state["model"]["w"][::2]}
    assert writer.submit(1, state, {tmp_path / "best": best, slow_file: best})
    state["model"]["w"].fill_(-1)
    state["model"]["n"].zero_()
    state["step"] = 99
    (tmp_path / "read").write_bytes(read_slow(slow_file))
    writer.wait()
    for path in (tmp_path / "best", tmp_path / "read"):
        assert load_checkpoint(path, CPU)["w"].tolist() == [1.0] * 500
    assert len(writer.failures()) == 1  # the pipe's
    # Buffers are used again, for a larger state and a smaller one.
    for step, size in ((2, 5000), (3, 10)):
        state = state_of(step, size)
        assert writer.submit(step, state)
        state["model"]["w"].fill_(-1)
        writer.wait()
        loaded = folder.load_newest(CPU)
        assert loaded is not None
        assert loaded.state["step"] == step
        assert loaded.state["model"]["w"].tolist() == [float(step)] * size


def test_while_busy_nothing_is_taken(writer: CheckpointWriter, folder: CheckpointFolder, slow_file: Path) -> None:
    assert not writer.busy
    assert writer.submit(1, state_of(1), {slow_file: state_of(1)})
    assert writer.busy
    assert not writer.submit(2, state_of(2))
    assert writer.failures() == []
    read_slow(slow_file)
    writer.wait()
    assert steps(folder) == []
    (failure,) = writer.failures()
    assert failure.startswith(f"cannot save {slow_file}: ")
    assert writer.failures() == []
    assert writer.submit(2, state_of(2))
    writer.wait()
    assert steps(folder) == ["step-00000002.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 700_000, 999_999])
def test_a_tensor_that_is_not_finite_is_not_saved(tmp_path: Path, dtype: torch.dtype, value: float, position: int) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    writer = CheckpointWriter(folder)
    limits = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny, -0.0], dtype=dtype)
    state = {"n": torch.tensor(-1), "none": torch.zeros(0), "limits": limits, "model": {"w": torch.ones(1_000_000, dtype=dtype)}}
    assert writer.submit(1, state)
    writer.wait()
    state["model"]["w"][position] = value
    assert writer.submit(2, state)
    writer.wait()
    assert writer.failures() == ["step 2 was not saved: model.w is not finite; the checkpoint before still stands"]
    assert steps(folder) == ["step-00000001.safetensors"]


@pytest.mark.parametrize("broken", [torch.tensor(float("nan")), float("nan")], ids=["tensor", "float"])
def test_one_broken_state_keeps_every_file_back(writer: CheckpointWriter, folder: CheckpointFolder, tmp_path: Path, broken: Any) -> None:
    best = tmp_path / "best"
    assert writer.submit(1, state_of(1), {best: state_of(1)})
    writer.wait()
    assert writer.submit(2, {"loss": broken}, {best: state_of(2)})
    writer.wait()
    assert writer.submit(3, state_of(3), {best: {"loss": broken}})
    writer.close()
    assert writer.failures() == [
        "step 2 was not saved: loss is not finite; the checkpoint before still stands",
        f"step 3 was not saved: loss (for {best}) is not finite; the checkpoint before still stands",
    ]
    assert steps(folder) == ["step-00000001.safetensors"]
    assert load_checkpoint(best, CPU)["step"] == 1


def test_a_full_disk_is_told_and_training_goes_on(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=3m")
    folder = CheckpointFolder(disk, keep=1)
    writer = CheckpointWriter(folder)
    for step, size in ((1, 10), (2, 1 << 20), (3, 1 << 20), (4, 10)):
        assert writer.submit(step, state_of(step, size))
        writer.wait()
        assert steps(folder) == [f"step-{4 if step == 4 else 1:08d}.safetensors"]
    assert [failure.partition("; ")[0] for failure in writer.failures()] == [
        f"cannot save {disk}/checkpoints/step-{step:08d}.safetensors: No space left on device" for step in (2, 3)
    ]


def test_what_no_checkpoint_can_hold_is_an_error_at_once(writer: CheckpointWriter, folder: CheckpointFolder) -> None:
    with pytest.raises(TypeError, match="cannot hold hook, which is a builtin_function_or_method"):
        writer.submit(1, {"hook": print})
    assert not writer.busy
    assert writer.submit(1, state_of(1))
    writer.wait()
    assert steps(folder) == ["step-00000001.safetensors"]


def test_a_program_that_fails_finishes_the_save_under_way(tmp_path: Path) -> None:
    source = """
import sys
from pathlib import Path
import torch
from bce3s.checkpoint import CheckpointFolder, CheckpointWriter
writer = CheckpointWriter(CheckpointFolder(Path(sys.argv[1]), keep=1))
writer.submit(7, {"w": torch.ones(4_000_000)})
raise KeyboardInterrupt
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", source, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in ended.stderr
    loaded = CheckpointFolder(tmp_path, keep=1).load_newest(CPU)
    assert loaded is not None
    assert loaded.path.name == "step-00000007.safetensors"
    assert torch.equal(loaded.state["w"], torch.ones(4_000_000))


@pytest.mark.cuda
class TestCuda:
    def test_no_later_update_overtakes_the_copy(self, writer: CheckpointWriter, folder: CheckpointFolder) -> None:
        """Updates are queued while the GPU is still busy with what came before the snapshot."""
        w = torch.full((1 << 24,), 1.0, device="cuda").to("cuda")
        image = torch.full((64, 3, 32, 32), 1.0, device="cuda").to(memory_format=torch.channels_last)
        for step in (1, 2):  # the second into buffers that are used again
            w.fill_(step)
            image.fill_(step)
            torch.cuda._sleep(100_000_000)
            before = torch.cuda.Event()
            before.record()
            assert writer.submit(step, {"w": w, "image": image, "cpu": torch.tensor(step)})
            assert not before.query()  # the host did not wait
            for _ in range(10):
                w.add_(1000)
                image.add_(1000)
            writer.wait()
            assert writer.failures() == []
            loaded = folder.load_newest(CPU)
            assert loaded is not None
            assert (loaded.state["w"] == step).all()
            assert (loaded.state["image"] == step).all()
            assert loaded.state["cpu"] == step

    def test_the_copies_land_in_pinned_memory_that_stays(self, writer: CheckpointWriter) -> None:
        w = torch.ones(1 << 20, device="cuda")
        addresses = []
        for step in (1, 2):
            assert writer.submit(step, {"w": w})
            writer.wait()
            assert writer._staging._data.is_pinned()
            addresses.append(writer._staging._data.data_ptr())
        assert addresses[0] == addresses[1]

    def test_what_is_not_finite_on_the_gpu_is_not_saved(self, writer: CheckpointWriter, folder: CheckpointFolder) -> None:
        w = torch.ones(1 << 20, device="cuda", dtype=torch.bfloat16)
        w[12345] = float("nan")
        assert writer.submit(1, {"w": w})
        writer.wait()
        assert folder.newest() is None
        (failure,) = writer.failures()
        assert "w is not finite" in failure


def test_closing_frees_and_tells(folder: CheckpointFolder, slow_file: Path) -> None:
    writer = CheckpointWriter(folder)
    assert writer.submit(1, state_of(1), {slow_file: {}})
    reader = threading.Thread(target=read_slow, args=(slow_file,))
    reader.start()
    writer.close()
    reader.join()
    assert not writer.busy
    assert len(writer.failures()) == 1
