"""Writes a data set as WebDataset tars with manifest and index: all of it, or nothing.

Everything goes to `OUT.partial`, is fsynced there and renamed to OUT as the last act, so a killed run leaves no half-written shards
under the final name. The same input gives byte-identical output: fixed tar headers, no dates, keys in order.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import tarfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import require, require_choice
from pipelines.durable import publish_folder, write_atomically
from pipelines.format.encoding import prepare_sample
from pipelines.format.index import FORMAT_NAME, FORMAT_VERSION, INDEX_DTYPE, MANIFEST_FILE, index_file, sha256_file, shard_file
from pipelines.types import SPLITS, DatasetError, EncodedSample, IntArray, OpenDataset, ShardError, Split

_Prepared = tuple[EncodedSample, int, int, bool]


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How shards are written.

    Args:
        shard_bytes: a shard is closed once it holds at least this many bytes.
        on_error: "stop" at the first image that does not decode, or "skip" it and count it.
        overwrite: replace an existing output folder.
        num_threads: readers and decoders at once.
    """

    shard_bytes: int = 256 << 20
    on_error: str = "stop"
    overwrite: bool = False
    num_threads: int = os.cpu_count() or 1

    def __post_init__(self) -> None:
        require(self.shard_bytes >= 1024, f"shard_bytes must be at least 1024, not {self.shard_bytes}")
        require_choice("on_error", self.on_error, ("stop", "skip"))


@dataclass
class WriteReport:
    """What was written: class counts, int64 [K], per split; images re-encoded; and the sentence of each skipped image."""

    class_counts: dict[str, IntArray] = field(default_factory=dict)
    num_reencoded: int = 0
    skipped: list[str] = field(default_factory=list)


def write_shards(
    dataset: OpenDataset,
    orders: dict[str, IntArray],
    out: Path,
    options: WriteOptions,
    on_sample: Callable[[str, int], None] = lambda split, size: None,
) -> WriteReport:
    """Writes every split of `dataset` to the folder `out`.

    Args:
        dataset: where samples come from.
        orders: per split, int64 [N], the order in which its samples are written; id i of the shards is sample orders[split][i].
        out: final folder; its parent is made if missing.
        options: sizes, errors, threads.
        on_sample: called with (split, encoded bytes) after each sample, written or skipped.

    Raises:
        ShardError: `out` exists and `overwrite` is off, another run is writing it, or the disk is full or read-only.
        DatasetError: an image does not decode and `on_error` is "stop"; names the file.
    """
    out = out.absolute()
    _require_replaceable(out, options.overwrite)
    report = WriteReport()
    try:
        # Pillow warns of odd metadata, which does not matter here. Filters belong to the process, so they are set outside the threads.
        with warnings.catch_warnings(), _partial_folder(out) as partial:
            warnings.simplefilter("ignore")
            entries = {}
            for name in SPLITS:
                entries[name], labels = _write_split(dataset.splits[name], orders[name], name, partial, options, report, on_sample)
                report.class_counts[name] = np.bincount(labels, minlength=len(dataset.class_names))
                if name == "train" and not len(labels):
                    raise DatasetError(f"data set '{dataset.name}' has no readable training image; {out} was not written")
            manifest = {
                "format": FORMAT_NAME,
                "version": FORMAT_VERSION,
                "dataset": dataset.name,
                "options": dict(dataset.options),
                "class_names": list(dataset.class_names),
                "splits": {name: {**entry, "class_counts": report.class_counts[name].tolist()} for name, entry in entries.items()},
                "num_reencoded": report.num_reencoded,
                "num_skipped": len(report.skipped),
            }
            write_atomically(partial / MANIFEST_FILE, (json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())
            publish_folder(partial, out)
    except OSError as error:
        raise ShardError(f"cannot write shards to {out}: {error.strerror or error}; nothing was left under that name") from error
    return report


def _require_replaceable(out: Path, overwrite: bool) -> None:
    """Refuses an existing `out`; with `overwrite`, anything but shards or an empty folder, which may be somebody's photographs."""
    if not out.exists():
        return
    if not overwrite:
        raise ShardError(f"{out} exists already; add --overwrite to replace it or choose another --out")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_FILE).is_file()):
        raise ShardError(f"{out} is not a shard folder, so --overwrite does not remove it; choose another --out")


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A fresh `OUT.partial`, locked against a second run; removed again unless it was published."""
    partial = out.with_name(out.name + ".partial")
    lock_path = out.with_name(out.name + ".lock")
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ShardError(f"another run is writing {out} (it holds {lock_path}); wait for it or choose another --out") from None
        # The lock is ours, so what lies here was left by a killed run.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def _prepared_samples(split: Split, order_N: IntArray, options: WriteOptions, report: WriteReport) -> Iterator[_Prepared | None]:
    """Samples read and validated by a few threads, in order, a bounded number ahead; None for a skipped one."""
    with ThreadPoolExecutor(options.num_threads) as pool:
        pending: deque[Future[_Prepared]] = deque()
        remaining = iter(order_N.tolist())
        try:
            for position in remaining:
                pending.append(pool.submit(lambda i: prepare_sample(split.read(i)), position))
                if len(pending) >= 4 * options.num_threads:
                    yield _result(pending.popleft(), options, report)
            while pending:
                yield _result(pending.popleft(), options, report)
        finally:
            for future in pending:
                future.cancel()


def _result(future: Future[_Prepared], options: WriteOptions, report: WriteReport) -> _Prepared | None:
    try:
        return future.result()
    except DatasetError as error:
        if options.on_error == "stop":
            raise DatasetError(f"{error}; mend or remove it, or add --on-error skip") from error
        report.skipped.append(str(error))
        return None


def _write_split(
    split: Split,
    order_N: IntArray,
    name: str,
    folder: Path,
    options: WriteOptions,
    report: WriteReport,
    on_sample: Callable[[str, int], None],
) -> tuple[dict[str, Any], IntArray]:
    """Writes one split's tars and index; returns its manifest entry and the labels written."""
    records: list[tuple[int, int, int, int, int, int]] = []
    shards: list[dict[str, Any]] = []
    tar: _ShardTar | None = None
    try:
        for prepared in _prepared_samples(split, order_N, options, report):
            if prepared is None:
                on_sample(name, 0)
                continue
            sample, height, width, reencoded = prepared
            report.num_reencoded += reencoded
            if tar is None:
                tar = _ShardTar(folder / shard_file(name, len(shards)))
            offset = tar.add(len(records), sample)
            records.append((len(shards), len(sample.encoded), offset, sample.label, height, width))
            on_sample(name, len(sample.encoded))
            if tar.num_bytes >= options.shard_bytes:
                shards.append(tar.finish())
                tar = None
        if tar is not None:
            shards.append(tar.finish())
    finally:
        if tar is not None:
            tar.close()
    index = np.array(records, INDEX_DTYPE)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, index, version=(1, 0), allow_pickle=False)
    write_atomically(folder / index_file(name), buffer.getvalue())
    entry = {
        "num_samples": len(records),
        "shards": shards,
        "index": {"file": index_file(name), "sha256": sha256_file(folder / index_file(name))},
    }
    return entry, index["label"].astype(np.int64)


class _ShardTar:
    """One tar being written: `{id:08d}.jpg|png` and `{id:08d}.cls` per sample, with headers that depend on nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._num_samples = 0

    @property
    def num_bytes(self) -> int:
        return self._tar.offset

    def add(self, sample_id: int, sample: EncodedSample) -> int:
        """Adds one sample; returns the offset of its image bytes in the tar."""
        offset = self._tar.offset + tarfile.BLOCKSIZE
        for extension, content in ((sample.extension, sample.encoded), ("cls", str(sample.label).encode())):
            header = tarfile.TarInfo(f"{sample_id:08d}.{extension}")
            header.size = len(content)
            header.mode = 0o444
            self._tar.addfile(header, io.BytesIO(content))
        self._num_samples += 1
        return offset

    def close(self) -> None:
        """Closes the file, finished or not; may be called twice."""
        self._file.close()

    def finish(self) -> dict[str, Any]:
        """Completes and fsyncs the file; returns its manifest entry."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {
            "file": self._path.name,
            "num_samples": self._num_samples,
            "shard_bytes": self._path.stat().st_size,
            "sha256": sha256_file(self._path),
        }
