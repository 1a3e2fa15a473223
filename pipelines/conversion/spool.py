"""Turns a source that can only be read front to back into units of work.

Samples of a compressed archive come in the archive's order, shards want them shuffled. Each sample is prepared as it passes and appended
to the spool file of its unit; afterwards units are written from their spool files, which are deleted one by one. No more disk than the
shards themselves take is needed, and the archive is read once.

A spool file holds entries: an ENTRY record, then `size` bytes: the image or, for a skipped sample (height 0), the sentence that says why.
How far the archive was read is written down from time to time, with the size of every spool file then; a killed run truncates them to
that and goes on.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.conversion.plan import Unit
from pipelines.conversion.unit import Outcome, SourceSamples
from pipelines.durable import write_atomically
from pipelines.format.encoding import PreparedSample, prepare_sample
from pipelines.types import EncodedSample, IntArray, ShardError

SPOOL_FOLDER = "spool"
_STATE_FILE = "state.json"
_CHECKPOINT_EVERY = 4096  # samples
_MAX_OPEN = 256  # spool files; shards of one conversion may be more than a process may have files

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
    on_sample: Callable[[int], None],
) -> None:
    """Reads the stream of `source.dataset` once and appends every sample to the spool file of each unit that holds it.

    Args:
        source: with the stream, the orders, and what becomes of the pixels.
        units: those to be written; samples of others pass by.
        folder: of the spool files; what a killed run left there is continued.
        on_sample: called with the bytes of each sample.

    Raises:
        DatasetError: the archive is damaged, lacks a sample, or holds an image that does not decode where that is not skipped.
        OSError: the disk is full.
    """
    assert source.dataset.stream is not None
    spools = _Spools(folder, units)
    wanted = _Wanted(source.orders, units)
    num_read = spools.restore()
    if num_read is None:
        return
    samples = islice(source.dataset.stream(), num_read, None)
    with ThreadPoolExecutor(source.num_threads) as pool:
        pending: deque[tuple[str, int, int, Future[PreparedSample]]] = deque()

        def drain(limit: int) -> None:
            while len(pending) > limit:
                split, row, label, future = pending.popleft()
                outcome = source.outcome(future.result)
                place = wanted.place(split, row)
                assert place is not None  # or it would not be pending
                spools.append(*place, label, outcome)
                on_sample(0 if isinstance(outcome, str) else len(outcome.sample.encoded))

        try:
            for split, row, sample in samples:
                num_read += 1
                if wanted.place(split, row):
                    pending.append((split, row, sample.label, pool.submit(prepare_sample, sample, source.pixels)))
                    drain(8 * source.num_threads)
                if num_read % _CHECKPOINT_EVERY == 0:
                    drain(0)
                    spools.checkpoint(num_read)
            drain(0)
            spools.checkpoint(None)
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
    """The spool files of a conversion and what is known to be in them."""

    def __init__(self, folder: Path, units: list[Unit]) -> None:
        self._folder = folder
        self._paths = {unit: folder / unit.name for unit in units}
        self._files: dict[Unit, _File] = {}
        folder.mkdir(exist_ok=True)

    def restore(self) -> int | None:
        """Samples of the stream that need not be read again, with every spool file as it was then; None when all are in."""
        try:
            state = json.loads((self._folder / _STATE_FILE).read_bytes())
        except (OSError, ValueError):
            state = {"num_read": 0, "sizes": {}}
        if state["num_read"] is None:
            return None
        for path in self._paths.values():
            with path.open("ab") as file:
                file.truncate(state["sizes"].get(path.name, 0))
        return int(state["num_read"])

    def append(self, unit: Unit, key: int, label: int, outcome: Outcome) -> None:
        if isinstance(outcome, str):
            content = outcome.encode("utf-8", "surrogateescape")
            entry = (key, len(content), label, 0, 0, 0, 0)
        else:
            content = outcome.sample.encoded
            entry = (key, len(content), label, outcome.height, outcome.width, outcome.sample.extension == "png", outcome.reencoded)
        self._file(unit).write(np.array(entry, ENTRY).tobytes() + content)

    def checkpoint(self, num_read: int | None) -> None:
        """Makes what was appended last, then writes down how far the stream was read (None: to its end)."""
        for file in self._files.values():
            file.sync()
        sizes = {path.name: path.stat().st_size for path in self._paths.values()}
        write_atomically(self._folder / _STATE_FILE, json.dumps({"num_read": num_read, "sizes": sizes}).encode())

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, unit: Unit) -> _File:
        if unit not in self._files:
            if len(self._files) >= _MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[unit] = _File(self._paths[unit])
        return self._files[unit]


class _File:
    """An append-only file that is synced when closed, so that a checkpoint need only sync the open ones."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


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
