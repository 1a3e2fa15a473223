"""Real images to convert, the ways to end a conversion before it is done, and what it left."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.conversion import ExecutorOptions, WriteOptions, WriteReport, write_shards
from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.store import LocalStore
from pipelines.types import SPLITS, EncodedSample, IntArray, OpenDataset

COUNTS: Mapping[str, Mapping[str, int]] = {"train": {"ant": 24, "bee": 11, "cat": 5}, "val": {"ant": 5, "cat": 3}, "test": {"bee": 7}}
SHARD_BYTES = 16 << 10  # seven of our images, about
_FORK = get_context("fork")


def jpeg(number: int) -> bytes:
    """Noise of 12 to 31 pixels a side, another one for every number."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(12, 32, 2)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def photo_folder(root: Path, counts: Mapping[str, Mapping[str, int]] = COUNTS) -> Path:
    """`root/<split>/<class>/<number>.jpg`."""
    number = 0
    for split, classes in counts.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for _ in range(count):
                (root / split / name / f"{number:04d}.jpg").write_bytes(jpeg(number))
                number += 1
    return root


def opened(root: Path) -> OpenDataset:
    """The folder as a data set; a split without a folder is empty."""
    absent = {f"{split}_fraction": 0.0 for split in ("val", "test") if not (root / split).exists()}
    return open_dataset("folder", DatasetOptions(source=root, **absent))


def orders_of(dataset: OpenDataset, seed: int = 0, limit: int | None = None) -> dict[str, IntArray]:
    """Train shuffled, the others as they come; at most `limit` of each."""
    sizes = {split: len(dataset.splits[split].labels_N) for split in SPLITS}
    orders = {split: np.arange(size, dtype=np.int64) for split, size in sizes.items()}
    orders["train"] = np.random.default_rng(seed).permutation(sizes["train"]).astype(np.int64)
    return {split: order_N[:limit] for split, order_N in orders.items()}


def write_options(processes: int = 1, executor: str = "local", **options: Any) -> WriteOptions:
    return WriteOptions(**{"shard_bytes": SHARD_BYTES, "executor": ExecutorOptions(num_processes=processes, executor=executor), **options})


@dataclass
class Progress:
    """Keeps what a conversion reports, and calls `react(stage, images and skipped)` each time."""

    react: Callable[[str, int], None] = lambda stage, done: None
    seen: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def __call__(self, stage: str, total: int, images: int, num_bytes: int, skipped: int) -> None:
        self.seen.setdefault(stage, []).append((images + skipped, total))
        self.react(stage, images + skipped)

    def assert_sound(self) -> None:
        """No stage goes back or beyond its total, and each ends there."""
        assert self.seen
        for reports in self.seen.values():
            done, totals = zip(*reports, strict=True)
            assert len(set(totals)) == 1
            assert list(done) == sorted(done)
            assert done[-1] == totals[-1]


def convert(
    source: Path | OpenDataset,
    out: Path | str,
    progress: Callable[[str, int, int, int, int], None] | None = None,
    *,
    seed: int = 0,
    limit: int | None = None,
    **options: Any,
) -> WriteReport | None:
    """Converts a folder of photographs, or a data set that is open already."""
    dataset = opened(source) if isinstance(source, Path) else source
    return write_shards(dataset, orders_of(dataset, seed, limit), out, write_options(**options), progress or Progress())


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def identities(folder: Path, pattern: str = "*.tar") -> dict[str, tuple[int, int]]:
    """Inode and time of change: equal only for a file that nobody has written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob(pattern)}


def source_file(root: Path, position: int, split: str = "train") -> Path:
    """The photograph at `position` of the write order."""
    dataset = opened(root)
    return Path(dataset.splits[split].sources[int(orders_of(dataset)[split][position])])


def slow(dataset: OpenDataset, read_s: float) -> OpenDataset:
    """As from a slow disk."""

    def delayed(read: Callable[[int], EncodedSample]) -> Callable[[int], EncodedSample]:
        def wait_and_read(position: int) -> EncodedSample:
            time.sleep(read_s)
            return read(position)

        return wait_and_read

    return replace(dataset, splits={name: replace(split, read=delayed(split.read)) for name, split in dataset.splits.items()})


# ---- processes that end early


def in_child(function: Callable[[], object]) -> BaseProcess:
    """Starts `function` in a forked process; how it ended is its exit code: 0, 1 for an exception, minus a signal."""

    def run() -> None:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = _FORK.Process(target=run)
    process.start()
    return process


def ended(process: BaseProcess, within_s: float = 30) -> int | None:
    """Exit code of a child; None if it had to be killed after `within_s`."""
    process.join(within_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def must_die(function: Callable[[], object]) -> None:
    """Runs `function` in a process of its own, which must end by SIGKILL."""
    assert ended(in_child(function)) == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at(stage: str, done: int) -> Progress:
    """Progress whose process is killed once `done` images of `stage` are done."""
    return Progress(lambda name, now: die() if name == stage and now >= done else None)


def die_after_writing(last: str) -> None:
    """Makes this process die right after a file of that name is stored by itself or one of its workers."""
    owner, store_bytes = os.getpid(), LocalStore.write_bytes

    def write_bytes(self: LocalStore, name: str, content: bytes) -> None:
        store_bytes(self, name, content)
        if name == last:
            os.kill(owner, signal.SIGKILL)

    LocalStore.write_bytes = write_bytes  # type: ignore[method-assign]


def children(process: int | None = None) -> list[int]:
    """Processes that this one (or another) has forked and that still run."""
    process = process or os.getpid()
    found = [int(child) for tasks in Path(f"/proc/{process}/task").glob("*/children") for child in tasks.read_text().split()]
    return [child for child in found if runs(child)]


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], within_s: float = 10) -> bool:
    deadline_s = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return condition()
