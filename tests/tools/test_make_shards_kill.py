"""Killed, interrupted and terminated at any moment: --resume continues, and every byte is that of an uninterrupted run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.format import open_shards
from tests.tools.conversions import FOLDER, digests, last_words, must_convert, photo_folder, start

STREAMS = ("--resample", "class-balanced", "--resample", "square-root")
WORK = (*FOLDER, "--out", "out", "--shard-bytes", "96KiB", "--processes", "2")


@dataclass(frozen=True)
class Uninterrupted:
    """A conversion that nobody disturbed: what it left, and how long it took."""

    folder: Path
    arguments: tuple[str, ...]
    files: dict[str, str]
    run_s: float


def uninterrupted(folder: Path, *extras: str, size: int = 64) -> Uninterrupted:
    photo_folder(folder / "photos", {"ant": 200, "bee": 90, "cat": 20}, size=size)
    started_s = time.monotonic()
    must_convert(*WORK, *extras, cwd=folder)
    run_s = time.monotonic() - started_s
    files = digests(folder / "out")
    assert len([name for name in files if name.endswith(".tar")]) > 8
    (folder / "out").rename(folder / "undisturbed")
    return Uninterrupted(folder, (*WORK, *extras), files, run_s)


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    return uninterrupted(tmp_path_factory.mktemp("streams"), *STREAMS)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    pytest.importorskip("ffcv", reason="betons need FFCV")
    return uninterrupted(tmp_path_factory.mktemp("everything"), *STREAMS, "--materialise", "--format", "wds,ffcv", size=96)


def work_folder(work: Uninterrupted, folder: Path) -> Path:
    (folder / "photos").symlink_to(work.folder / "photos")
    return folder


def kill(arguments: tuple[str, ...], folder: Path, after_s: float, signal_number: int = signal.SIGKILL) -> tuple[int, str]:
    """Starts the command and sends it a signal after a while; returns exit status and what it said. No worker may outlive it."""
    process = start(*arguments, cwd=folder)
    time.sleep(after_s)
    process.send_signal(signal_number)
    said = last_words(process)
    return process.returncode, said


def assert_whole(work: Uninterrupted, folder: Path) -> None:
    assert digests(folder / "out") == work.files
    assert sorted(path.name for path in folder.iterdir()) == ["out", "photos"]  # no lock, nothing partial


def moments(work: Uninterrupted, number: int, seed: int) -> list[float]:
    """Seconds after the start, one drawn from each of `number` equal parts of the run."""
    draw = random.Random(seed)
    return [(part + draw.random()) / number * work.run_s for part in range(number)]


@pytest.mark.parametrize("number", range(5))
def test_killed_at_any_moment_and_resumed(streams: Uninterrupted, tmp_path: Path, number: int) -> None:
    folder = work_folder(streams, tmp_path)
    kill(streams.arguments, folder, moments(streams, 5, seed=7)[number])
    assert not (folder / "out").exists() or digests(folder / "out") == streams.files
    must_convert(*streams.arguments, "--resume", cwd=folder)
    assert_whole(streams, folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_killed_at_twenty_moments_with_everything_asked_for(everything: Uninterrupted, tmp_path: Path, number: int) -> None:
    folder = work_folder(everything, tmp_path)
    moment_s = moments(everything, 20, seed=11)[number]
    kill(everything.arguments, folder, moment_s)
    if number % 2:  # and killed once more while it resumes
        kill((*everything.arguments, "--resume"), folder, moment_s / 2)
    assert not (folder / "out").exists() or digests(folder / "out") == everything.files
    must_convert(*everything.arguments, "--resume", cwd=folder)
    assert_whole(everything, folder)


@pytest.mark.slow
def test_killed_over_and_over_it_still_gets_there(streams: Uninterrupted, tmp_path: Path) -> None:
    folder = work_folder(streams, tmp_path)
    for attempt in range(1, 9):
        status, _ = kill((*streams.arguments, "--resume"), folder, streams.run_s * (0.6 + 0.05 * attempt))
        if status == 0:
            break
    must_convert(*streams.arguments, "--resume", cwd=folder)
    assert_whole(streams, folder)


def wait_for_a_shard(process_folder: Path, deadline_s: float = 30) -> None:
    """Until the first shard is finished and more are to come."""
    end_s = time.monotonic() + deadline_s
    while not list(process_folder.glob("out.partial/units/*.json")) and time.monotonic() < end_s:
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("signal_number", "status", "group"),
    [(signal.SIGINT, 130, False), (signal.SIGINT, 130, True), (signal.SIGTERM, 143, False), (signal.SIGTERM, 143, True)],
    ids=["interrupt", "ctrl-c", "terminate", "terminate the group"],
)
def test_interrupted_it_says_how_to_continue(tmp_path: Path, signal_number: int, status: int, group: bool) -> None:
    photo_folder(tmp_path / "photos", {"ant": 250, "bee": 150}, size=192)
    process = start(*WORK, cwd=tmp_path)
    wait_for_a_shard(tmp_path)
    (os.killpg if group else os.kill)(process.pid, signal_number)
    said = last_words(process)
    assert process.returncode == status, said
    assert said.count("\n") == 1, said
    assert "--resume" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "photos"]
    if not (group and signal_number == signal.SIGTERM):  # else the workers had no time to tidy up
        assert not list((tmp_path / "out.partial").rglob("*.partial"))
    must_convert(*WORK, "--resume", cwd=tmp_path)
    assert open_shards(tmp_path / "out").num_samples("train") == 320


@pytest.mark.slow
def test_interrupted_just_when_a_shard_ends_it_never_hangs(tmp_path: Path) -> None:
    # An interrupt between two locks of the process pool would keep one of them for ever.
    photo_folder(tmp_path / "photos", {"ant": 200, "bee": 100}, size=96)
    draw = random.Random(5)
    for attempt in range(20):
        process = start(*FOLDER, "--out", "out", "--shard-bytes", "16KiB", "--processes", "2", cwd=tmp_path)
        wait_for_a_shard(tmp_path)
        time.sleep(draw.random() * 0.2)
        signal_number = (signal.SIGINT, signal.SIGTERM)[attempt % 2]
        os.killpg(process.pid, signal_number)
        assert last_words(process).startswith("interrupted: ") or process.returncode == 0
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_the_source_is_opened(tmp_path: Path, signal_number: int, status: int) -> None:
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / "ImageNet_LT_train.txt")  # as slow as a list can be
    process = start("--dataset", "imagenet-lt", "--source", "images", "--lists", "images", "--out", "out", cwd=tmp_path)
    with (tmp_path / "images" / "ImageNet_LT_train.txt").open("w"):  # opens once the command does
        process.send_signal(signal_number)
        said = last_words(process)
    assert process.returncode == status
    assert said.startswith("interrupted: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_killed_worker_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    photo_folder(tmp_path / "photos", {"ant": 250, "bee": 150}, size=192)
    process = start(*WORK, cwd=tmp_path)
    wait_for_a_shard(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    said = last_words(process)
    assert process.returncode == 2
    assert said.startswith("error: a worker process was killed")
    assert said.count("\n") == 1
    must_convert(*WORK, "--resume", cwd=tmp_path)
