"""Turns a source that can only be read front to back into units of work.

Samples of a compressed archive come in the archive's order, shards want them shuffled. Each sample is prepared as it passes and appended
to the spool file of its unit; afterwards units are written from their spool files, which are deleted one by one. No more disk than the
shards themselves take is needed, and the archive is read once.

A spool file holds entries: an ENTRY record, then `size` bytes: the image or, for a skipped sample (height 0), the sentence that says why.
How far the archive was read is written down from time to time, with the size of every spool file then; the run after a killed one truncates
them to that and goes on.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.conversion.plan import Unit
from pipelines.conversion.unit import Outcome, SourceSamples
from pipelines.durable import write_atomically
from pipelines.format.encoding import PreparedSample, prepare_sample
from pipelines.types import DatasetError, EncodedSample, IntArray, ShardError

SPOOL_FOLDER = "spool"
_STATE_FILE = "state.json"
_CHECKPOINT_EVERY = 4096  # samples
_MAX_OPEN = 256  # spool files; shards of one conversion may be more than a process may have files
_READ_AHEAD = 8  # samples a thread may be ahead of the writer

ENTRY = np.dtype(
    [("key", "<u8"), ("size", "<u4"), ("label", "<i4"), ("height", "<u2"), ("width", "<u2"), ("png", "u1"), ("reencoded", "u1")]
)


@dataclass(frozen=True, kw_only=True)
class SpooledSamples:
    """Gives the samples of a unit from its spool file, in order of their keys; takes the place of `SourceSamples`."""

    folder: Path

    def __call__(self, unit: Unit) -> Iterator[Outcome]:
        """Yields one outcome for each position of `unit`.

        Raises:
            ShardError: the spool file is gone or cut short.
        """
        path = self.folder / unit.name
        try:
            content = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise ShardError(f"cannot read {path} ({error}): start over with --overwrite") from error
        starts = _entries(content)
        if sorted(starts) != list(range(unit.start, unit.stop)):
            raise ShardError(f"{path} does not hold the samples it should: start over with --overwrite")
        for key in range(unit.start, unit.stop):
            yield _outcome(content, starts[key])


def spool(
    source: SourceSamples,
    units: list[Unit],
    folder: Path,
    plan_sha256: str,
    on_progress: Callable[[int, int], None],
) -> None:
    """Reads the stream of `source.dataset` once and appends every sample to the spool file of each unit that holds it.

    Args:
        source: with the stream, the orders, and what becomes of the pixels.
        units: those to be written; samples of others pass by.
        folder: of the spool files; what a killed run of the same plan left there is continued.
        plan_sha256: of the plan.
        on_progress: called with the samples in the spool files, those of earlier runs included, and the bytes that came in this one.

    Raises:
        DatasetError: the archive is damaged, lacks a sample, or holds an image that does not decode where that is not skipped.
        OSError: the disk is full.
    """
    assert source.dataset.stream is not None
    spools = _Spools(folder, units, plan_sha256)
    wanted = _Wanted(source.orders, units)
    if spools.restore():
        return
    first = spools.num_read
    samples = islice(source.dataset.stream(), first, None)
    with ThreadPoolExecutor(source.num_threads) as pool:
        pending: deque[tuple[int, Unit, int, int, Future[PreparedSample]]] = deque()

        def drain(limit: int) -> None:
            while len(pending) > limit:
                num_read, unit, key, label, future = pending.popleft()
                spools.append(unit, key, label, source.outcome(future.result), num_read)
                on_progress(spools.num_samples, spools.num_bytes)

        try:
            for num_read, (split, row, sample) in enumerate(samples, start=first + 1):
                place = wanted.place(split, row)
                if place is not None:
                    pending.append((num_read, *place, sample.label, pool.submit(prepare_sample, sample, source.pixels)))
                    drain(_READ_AHEAD * source.num_threads)
                if num_read % _CHECKPOINT_EVERY == 0:
                    drain(0)
                    spools.checkpoint()
            drain(0)
            spools.checkpoint(complete=True)
        except DatasetError as error:
            # Where an archive is cut short, or one image is bad, all before that is good. Damage, of which a checksum tells that may stand
            # at the very end, can lie anywhere in what was read.
            if error.__cause__ is None or isinstance(error.__cause__, (EOFError, DatasetError)):
                spools.checkpoint()
            else:
                spools.forget()
            raise
        finally:
            for *_, future in pending:
                future.cancel()
            spools.close()


class _Wanted:
    """Which unit takes a sample of the source, and where; rows that `--limit` or another part leaves out have no place."""

    def __init__(self, orders: Mapping[str, IntArray], units: list[Unit]) -> None:
        self._units = units
        self._unit_of_row: dict[str, IntArray] = {}
        self._position_of_row: dict[str, IntArray] = {}
        for split, order_N in orders.items():
            self._unit_of_row[split] = np.full(int(order_N.max(initial=-1)) + 1, -1, np.int64)
            self._position_of_row[split] = np.zeros_like(self._unit_of_row[split])
        for number, unit in enumerate(units):
            rows = orders[unit.split][unit.start : unit.stop]
            self._unit_of_row[unit.split][rows] = number
            self._position_of_row[unit.split][rows] = np.arange(unit.start, unit.stop)

    def place(self, split: str, row: int) -> tuple[Unit, int] | None:
        """The unit and its key in it."""
        unit_of_row = self._unit_of_row[split]
        number = int(unit_of_row[row]) if row < len(unit_of_row) else -1
        return (self._units[number], int(self._position_of_row[split][row])) if number >= 0 else None


class _Spools:
    """The spool files of a conversion and what is known to be in them.

    Attributes:
        num_read: samples of the stream that need not be read again.
        num_samples: in the files.
        num_bytes: of the images appended by this run.
    """

    def __init__(self, folder: Path, units: list[Unit], plan_sha256: str) -> None:
        self._state_path = folder / _STATE_FILE
        self._plan_sha256 = plan_sha256
        self._paths = {unit: folder / unit.name for unit in units}
        self._open: dict[Unit, BinaryIO] = {}
        self._unsynced: set[Unit] = set()
        self.num_read, self.num_samples, self.num_bytes = 0, 0, 0
        folder.mkdir(mode=0o700, exist_ok=True)

    def restore(self) -> bool:
        """Makes every spool file what it was at the last checkpoint; True where the whole stream was read by then."""
        try:
            state = json.loads(self._state_path.read_bytes())
        except (OSError, ValueError):
            state = {}
        if state.get("plan_sha256") != self._plan_sha256:
            state = {"num_read": 0, "num_samples": 0, "complete": False, "sizes": {}}
        self.num_read, self.num_samples = state["num_read"], state["num_samples"]
        if not state["complete"]:
            for path in self._paths.values():
                with path.open("ab") as file:
                    file.truncate(state["sizes"].get(path.name, 0))
        return bool(state["complete"])

    def append(self, unit: Unit, key: int, label: int, outcome: Outcome, num_read: int) -> None:
        if isinstance(outcome, str):
            content = outcome.encode("utf-8", "surrogateescape")
            entry = (key, len(content), label, 0, 0, 0, 0)
        else:
            content = outcome.sample.encoded
            entry = (key, len(content), label, outcome.height, outcome.width, outcome.sample.extension == "png", outcome.reencoded)
            self.num_bytes += len(content)
        self._file(unit).write(np.array(entry, ENTRY).tobytes() + content)
        self._unsynced.add(unit)
        self.num_read = num_read
        self.num_samples += 1

    def checkpoint(self, *, complete: bool = False) -> None:
        """Makes what was appended last, then writes down how far the stream was read."""
        for file in self._open.values():
            file.flush()
        for unit in self._unsynced:
            with self._paths[unit].open("rb") as written:
                os.fsync(written.fileno())
        self._unsynced.clear()
        state = {"plan_sha256": self._plan_sha256, "num_read": self.num_read, "num_samples": self.num_samples, "complete": complete}
        sizes = {path.name: path.stat().st_size for path in self._paths.values()}
        write_atomically(self._state_path, json.dumps({**state, "sizes": sizes}).encode())

    def forget(self) -> None:
        """Nothing of what was read counts."""
        self._state_path.unlink(missing_ok=True)

    def close(self) -> None:
        while self._open:
            with suppress(OSError):  # a full disk; what counts is checkpointed
                self._open.popitem()[1].close()

    def _file(self, unit: Unit) -> BinaryIO:
        if unit not in self._open:
            if len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[unit] = self._paths[unit].open("ab")
        return self._open[unit]


def _entries(content: NDArray[np.uint8]) -> dict[int, int]:
    """Offset of each entry by key; stops where the file is cut short, which the caller notices."""
    starts, offset = {}, 0
    while offset + ENTRY.itemsize <= len(content):
        entry = content[offset : offset + ENTRY.itemsize].view(ENTRY)[0]
        if offset + ENTRY.itemsize + int(entry["size"]) > len(content):
            break
        starts[int(entry["key"])] = offset
        offset += ENTRY.itemsize + int(entry["size"])
    return starts


def _outcome(content: NDArray[np.uint8], offset: int) -> Outcome:
    entry = content[offset : offset + ENTRY.itemsize].view(ENTRY)[0]
    encoded = content[offset + ENTRY.itemsize : offset + ENTRY.itemsize + int(entry["size"])].tobytes()
    if entry["height"] == 0:
        return encoded.decode("utf-8", "surrogateescape")
    sample = EncodedSample(encoded=encoded, extension="png" if entry["png"] else "jpg", label=int(entry["label"]), source="")
    return PreparedSample(sample, int(entry["height"]), int(entry["width"]), bool(entry["reencoded"]))
