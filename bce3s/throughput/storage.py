"""How fast encoded images come from storage and from the page cache, read in the order of the run, both streams of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from bce3s.throughput.page_cache import drop, resident_share
from bce3s.throughput.rows import Row
from bce3s.throughput.timing import MEASURED_FAILURES, Budget, Probe, reason_of, sample
from bce3s.throughput.workload import Workload
from pipelines.format import ShardSplit
from pipelines.loaders.resident_size import free_host_bytes
from pipelines.types import IntArray

READS_IN_FLIGHT = 16
_READS_A_TURN = 32  # by one thread, between two looks at the clock
_DROPPED = 0.02  # at most this share may stay behind
_WARM_SHARE = 0.5  # of the memory that is free


class EncodedReader:
    """Reads encoded images with pread(2), `READS_IN_FLIGHT` at a time."""

    def __init__(self, split: ShardSplit, ids_N: IntArray) -> None:
        """Will read the images of `ids_N` in that order, again and again."""
        self._split, self._ids_N, self._position = split, ids_N, 0
        self._pool = ThreadPoolExecutor(READS_IN_FLIGHT)
        self._local = threading.local()
        self._largest = int(split.sizes_N[ids_N].max())

    def restart(self) -> None:
        """Begins again with the first image."""
        self._position = 0

    def read_some(self) -> int:
        """Reads the next images, up to a few hundred; returns how many."""
        chunk = self._ids_N[self._position : self._position + READS_IN_FLIGHT * _READS_A_TURN]
        self._position = (self._position + len(chunk)) % len(self._ids_N)
        for _ in self._pool.map(self._read, np.array_split(chunk, min(READS_IN_FLIGHT, len(chunk)))):
            pass
        return len(chunk)

    def _read(self, ids: IntArray) -> None:
        split = self._split
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(self._largest))
        # A file is opened for every read: a set may have more shards than a process may have open files.
        for shard, offset, size in zip(
            split.shards_N[ids].tolist(), split.offsets_N[ids].tolist(), split.sizes_N[ids].tolist(), strict=True
        ):
            descriptor = os.open(split.paths[shard], os.O_RDONLY)
            try:
                read = os.preadv(descriptor, [self._local.buffer[:size]], offset)
            finally:
                os.close(descriptor)
            if read != size:
                raise OSError(f"{split.paths[shard]} was cut short while it was read")

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)


def storage_rows(workload: Workload, budget: Budget) -> Iterator[Row]:
    """The rows "storage.cold" and "storage.warm"; leaves the images of `warm_ids` in the page cache, for all rows that come later."""
    split, ids_N = workload.split, workload.epoch_ids()
    mean_bytes = float(split.sizes_N.mean())
    reader = EncodedReader(split, ids_N)
    try:
        yield _row("storage.cold", _cold_rates(reader, split, len(ids_N), budget), mean_bytes)
    finally:
        reader.close()
    warm_N = warm_ids(workload)
    reader = EncodedReader(split, warm_N)
    try:
        reason = _warm(split, warm_N)
        outcome = reason or sample(Probe(work=reader.read_some, settle=reader.restart), budget, torch.device("cpu"))
        yield _row("storage.warm", outcome, mean_bytes)
    finally:
        reader.close()


def _cold_rates(reader: EncodedReader, split: ShardSplit, num_images: int, budget: Budget) -> tuple[float, ...] | str:
    """Images/s of reading until the time is up, an epoch at most, with the page cache emptied before each repeat."""
    rates = []
    try:
        for _ in range(budget.repeats):
            drop(split.paths)
            left = resident_share(split.paths)
            if left > _DROPPED:
                return f"{left:.0%} of the pages stay in memory after posix_fadvise, as on tmpfs or where another process has mapped them"
            started_s, images, elapsed_s = time.perf_counter(), 0, 0.0
            while images < num_images and elapsed_s < budget.seconds:
                images += reader.read_some()
                elapsed_s = time.perf_counter() - started_s
            rates.append(images / elapsed_s)
    except MEASURED_FAILURES as error:
        return reason_of(error)
    return tuple(rates)


def _warm(split: ShardSplit, ids_N: IntArray) -> str:
    """Reads every image of int64 `ids_N` once, in the order in which they lie on the disk; the reason if that fails."""
    distinct_N = np.unique(ids_N)
    reader = EncodedReader(split, distinct_N[np.lexsort((split.offsets_N[distinct_N], split.shards_N[distinct_N]))])
    try:
        done = 0
        while done < len(distinct_N):
            done += reader.read_some()
    except MEASURED_FAILURES as error:
        return reason_of(error)
    finally:
        reader.close()
    return ""


def warm_ids(workload: Workload) -> IntArray:
    """int64 [E]: what the first measured epoch draws, up to as many different images as fit half of the memory that is free."""
    ids_N, room_bytes = workload.epoch_ids(), int(_WARM_SHARE * free_host_bytes())
    is_first_N = np.zeros(len(ids_N), np.bool_)
    is_first_N[np.unique(ids_N, return_index=True)[1]] = True  # drawn again, an image takes no more room
    held_bytes_N = np.cumsum(np.where(is_first_N, workload.split.sizes_N[ids_N], 0), dtype=np.int64)
    return ids_N[: max(1, int(np.searchsorted(held_bytes_N, room_bytes, side="right")))]


def _row(key: str, outcome: tuple[float, ...] | str, mean_bytes: float) -> Row:
    if isinstance(outcome, str):
        return Row(key=key, reason=outcome)
    rate = float(np.median(outcome))
    return Row(key=key, rates=outcome, details={"gb_per_s": rate * mean_bytes / 1e9, "reads_in_flight": READS_IN_FLIGHT})
