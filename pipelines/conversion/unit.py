"""Converts one unit of work: samples in, one tar and its record out."""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.conversion.plan import Unit
from pipelines.format.encoding import PixelOptions, PreparedSample, prepare_sample
from pipelines.format.index import INDEX_DTYPE, shard_file
from pipelines.format.tar import TarWriter
from pipelines.store import Store
from pipelines.types import DatasetError, IntArray, OpenDataset, ShardError

UNIT_FOLDER = "units"
_READ_AHEAD = 4  # samples a thread may be ahead of the writer

# A sample ready for a tar, or the sentence that says why it is left out.
Outcome = PreparedSample | str
Samples = Callable[[Unit], Iterator[Outcome]]


class Stopped(Exception):
    """Another unit failed or the user interrupted: this one ends early and leaves nothing."""


@dataclass
class Tally:
    """What a worker has done so far.

    Args:
        row: int64 [3], counts up: images, bytes, skipped.
        stop: int64 [1], not 0 when the worker should end.
        on_sample: called after each sample.
    """

    row: IntArray = field(default_factory=lambda: np.zeros(3, np.int64))
    stop: IntArray = field(default_factory=lambda: np.zeros(1, np.int64))
    on_sample: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What became of a unit, kept beside its tar until the conversion is complete.

    Args:
        name, start: of the unit.
        file: of its tar; "" where no sample was left.
        num_samples, shard_bytes, sha256: of the tar.
        num_reencoded: images whose bytes are not the source's.
        skipped: a sentence for each image left out.
        records_N: INDEX_DTYPE [N]; `shard` is not filled in yet.
    """

    name: str
    start: int
    file: str = ""
    num_samples: int = 0
    shard_bytes: int = 0
    sha256: str = ""
    num_reencoded: int = 0
    skipped: tuple[str, ...]
    records_N: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, INDEX_DTYPE))

    def to_json(self) -> bytes:
        """UTF-8 JSON; the records as base64."""
        content = {**vars(self), "records_N": base64.b64encode(self.records_N.tobytes()).decode()}
        return json.dumps(content, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes) -> UnitRecord:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it is damaged.
        """
        try:
            stored = json.loads(content)
            records_N = np.frombuffer(base64.b64decode(stored["records_N"]), INDEX_DTYPE)
            return cls(**{**stored, "records_N": records_N, "skipped": tuple(stored["skipped"])})
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from error


def record_file(unit: Unit) -> str:
    """Name of a unit's record in the store."""
    return f"{UNIT_FOLDER}/{unit.name}.json"


def stored_record(store: Store, unit: Unit) -> UnitRecord | None:
    """The record of a unit that is finished: its record is whole, of the same samples, and its tar has the size that it says.

    Raises:
        ShardError: a remote store does not answer, which is not the same as nothing being there.
    """
    try:
        content = store.read_bytes(record_file(unit))
    except FileNotFoundError:
        return None
    try:
        record = UnitRecord.from_json(content)
    except ValueError:
        return None
    same = (record.name, record.start, record.num_samples + len(record.skipped)) == (unit.name, unit.start, unit.stop - unit.start)
    return record if same and (not record.file or store.size(record.file) == record.shard_bytes) else None


def convert_unit(samples: Samples, unit: Unit, store: Store, tally: Tally) -> UnitRecord:
    """Writes the tar of `unit`, then its record.

    Raises:
        DatasetError: an image does not decode and is not to be skipped.
        OSError, ShardError: the store cannot take it; nothing is left under its name.
        Stopped: `tally.stop` was set.
    """
    file = shard_file(unit.split, unit.number)
    outcomes = _counted(samples(unit), tally)
    first: list[Outcome] = []
    for outcome in outcomes:
        first.append(outcome)
        if not isinstance(outcome, str):
            break
    if not first or isinstance(first[-1], str):
        # Nothing but skipped images leaves no tar, which readers would refuse; and none of a run that was killed before its record.
        store.delete(file)
        record = UnitRecord(name=unit.name, start=unit.start, skipped=tuple(str(outcome) for outcome in first))
    else:
        with store.write_file(file) as path, path.open("wb") as tar:
            record = _write_tar(unit, chain(first, outcomes), tar, file)
    store.write_bytes(record_file(unit), record.to_json())
    return record


def _counted(outcomes: Iterator[Outcome], tally: Tally) -> Iterator[Outcome]:
    """Passes `outcomes` on until the worker is told to stop."""
    for outcome in outcomes:
        if tally.stop[0]:
            raise Stopped
        tally.row += (0, 0, 1) if isinstance(outcome, str) else (1, len(outcome.sample.encoded), 0)
        tally.on_sample()
        yield outcome


def _write_tar(unit: Unit, outcomes: Iterator[Outcome], file: BinaryIO, name: str) -> UnitRecord:
    tar = TarWriter(file)
    records: list[tuple[int, int, int, int, int, int]] = []
    skipped: list[str] = []
    num_reencoded = 0
    for key, outcome in enumerate(outcomes, start=unit.start):
        if isinstance(outcome, str):
            skipped.append(outcome)
            continue
        sample, height, width, reencoded = outcome
        offset = tar.add(key, sample)
        records.append((0, len(sample.encoded), offset, sample.label, height, width))
        num_reencoded += reencoded
    sha256 = tar.finish()
    return UnitRecord(
        name=unit.name,
        start=unit.start,
        file=name,
        num_samples=len(records),
        shard_bytes=tar.num_bytes,
        sha256=sha256,
        num_reencoded=num_reencoded,
        skipped=tuple(skipped),
        records_N=np.array(records, INDEX_DTYPE),
    )


@dataclass(frozen=True, kw_only=True)
class SourceSamples:
    """Reads and prepares the samples of a unit from the data set, in order, with a few threads reading ahead.

    Args:
        dataset: where they come from.
        orders: per split, int64 [N]: position in the shards -> position in the split.
        pixels: what becomes of them.
        on_error: "stop" at an image that does not decode, or "skip" it.
        num_threads: 1 works without threads.
    """

    dataset: OpenDataset
    orders: Mapping[str, IntArray]
    pixels: PixelOptions
    on_error: str
    num_threads: int = 1

    def __call__(self, unit: Unit) -> Iterator[Outcome]:
        """Yields one outcome for each position of `unit`.

        Raises:
            DatasetError: an image does not decode and `on_error` is "stop"; names the file.
        """
        rows = self.orders[unit.split][unit.start : unit.stop].tolist()
        read = self.dataset.splits[unit.split].read
        if self.num_threads == 1:
            for row in rows:
                yield self.outcome(lambda row=row: prepare_sample(read(row), self.pixels))  # type: ignore[misc]
            return
        with ThreadPoolExecutor(self.num_threads) as pool:
            pending: deque[Future[PreparedSample]] = deque()
            try:
                for row in rows:
                    pending.append(pool.submit(lambda row=row: prepare_sample(read(row), self.pixels)))  # type: ignore[misc]
                    if len(pending) >= _READ_AHEAD * self.num_threads:
                        yield self.outcome(pending.popleft().result)
                while pending:
                    yield self.outcome(pending.popleft().result)
            finally:
                for future in pending:
                    future.cancel()

    def outcome(self, prepared: Callable[[], PreparedSample]) -> Outcome:
        """What `prepared` gives, or the sentence it fails with where failures are skipped."""
        try:
            return prepared()
        except DatasetError as error:
            if self.on_error == "stop":
                raise DatasetError(f"{error}; mend it or add --on-error skip, then --resume continues") from error
            return str(error)


def require_records(records: Mapping[str, UnitRecord], units: list[Unit], where: str) -> None:
    """Raises `ShardError` where units have no record; says how many."""
    missing = [unit.name for unit in units if unit.name not in records]
    if missing:
        raise ShardError(
            f"{len(missing)} of {len(units)} shards are not at {where} yet ({missing[0]} is the first): "
            "convert the parts that make them, then merge"
        )
