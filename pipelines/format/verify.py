"""Checks a shard folder: checksums of all files, every sample of every tar against the index, images by decoding them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.format.examine import Problem, ShardFindings, examine_shard
from pipelines.format.index import MANIFEST_FILE, npy_records, open_inside, read_manifest
from pipelines.format.manifest import count_faults, manifest_faults, named_files, streams
from pipelines.format.reader import index_fault, map_file, read_index
from pipelines.types import IntArray

__all__ = ["Problem", "verified_bytes", "verify_shards"]

_ORDER_DTYPE = np.dtype("<u4")
_READ_BYTES = 1 << 20
_IDX_PATH = re.compile(r"[A-Za-z0-9._-]+\.dali/[0-9]+\.idx")


class _Halted(Exception):
    """Another thread failed or the user interrupted."""


def verify_shards(
    root: Path,
    *,
    decode: bool = True,
    num_threads: int = os.cpu_count() or 1,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> list[Problem]:
    """Checks everything at `root` that its manifest names.

    Args:
        root: the shard folder.
        decode: decode every image in full; off, its header is read.
        num_threads: shards at once; reading, hashing and decoding leave Python's lock alone.
        on_bytes: called with the bytes just checked, often and from several threads; they sum up to about `verified_bytes`.

    Returns:
        What is wrong, in the manifest's order; nothing for a good folder.

    Raises:
        ShardError: there is no manifest of this format and version to check against.
    """
    manifest, _ = read_manifest(root)
    path = root / MANIFEST_FILE
    faults = manifest_faults(manifest)
    if faults:  # nothing else it says can be relied on
        return [Problem(path, None, fault) for fault in faults]
    problems = [Problem(path, None, fault) for fault in count_faults(manifest)]
    halted = threading.Event()

    def count(num_bytes: int) -> None:
        if halted.is_set():
            raise _Halted
        on_bytes(num_bytes)

    with ThreadPoolExecutor(num_threads) as pool:
        try:
            found = {name: _Stream(root, name, entry, pool, decode, count) for name, entry in streams(manifest).items()}
            files = [entry for entry in named_files(manifest)[1:] if "shard_bytes" not in entry]
            sums = [pool.submit(_checksum_problems, root, entry, count) for entry in files]
            for stream in found.values():
                problems += stream.problems()
            for checked in sums:
                problems += checked.result()
            for entry in manifest.get("resampled", []):
                if not entry["materialised"]:
                    problems += _order_problems(root, entry, found["train"].labels_N) + _dali_problems(root, entry)
        except BaseException:
            halted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return problems + _strays(root, manifest)


def verified_bytes(manifest: dict[str, Any]) -> int:
    """Bytes of tars and betons, for a progress bar; 0 for a manifest that `manifest_faults` complains of."""
    if manifest_faults(manifest):
        return 0
    return sum(entry.get("shard_bytes", entry.get("beton_bytes", 0)) for entry in named_files(manifest))


class _Stream:
    """A split or a materialised stream being checked."""

    def __init__(
        self, root: Path, name: str, entry: dict[str, Any], pool: ThreadPoolExecutor, decode: bool, on_bytes: Callable[[int], None]
    ) -> None:
        self._root, self._name, self._entry = root, name, entry
        self.labels_N: IntArray | None = None
        self._problems: list[Problem] = []
        index = self._index()
        first_id = 0
        self._shards: list[Future[ShardFindings]] = []
        for number, shard in enumerate(entry["shards"]):
            expected_N = None if index is None else index[index["shard"] == number]
            self._shards.append(
                pool.submit(
                    examine_shard,
                    root,
                    shard,
                    first_id=first_id,
                    num_classes=len(entry["class_counts"]),
                    expected_N=expected_N,
                    decode=decode,
                    on_bytes=on_bytes,
                )
            )
            first_id += shard["num_samples"]

    def _index(self) -> NDArray[np.void] | None:
        path = self._root / self._entry["index"]["file"]
        try:
            index = read_index(self._root, self._entry)
        except OSError:
            return None  # the checksum will say so
        except ValueError as error:
            self._problems.append(Problem(path, None, str(error)))
            return None
        fault = index_fault(index, self._entry)
        if fault is None:
            self.labels_N = index["label"].astype(np.int64)
            if (np.diff(index["shard"].astype(np.int64)) < 0).any():
                fault = "is not in the order of the shards"
        if fault:
            self._problems.append(Problem(path, None, fault))
        return index

    def problems(self) -> list[Problem]:
        """All that was found, once every shard has been examined."""
        findings = [shard.result() for shard in self._shards]
        problems = self._problems + [problem for found in findings for problem in found.problems]
        labels_N = np.concatenate([np.zeros(0, np.int32), *(found.records_N["label"] for found in findings)])
        counts_K = np.array(self._entry["class_counts"], np.int64)
        # Anything else that is wrong explains other counts; they are a finding of their own only where nothing is.
        if not problems and not np.array_equal(np.bincount(labels_N, minlength=len(counts_K)), counts_K):
            problems.append(Problem(self._root / MANIFEST_FILE, None, f"has other class_counts of '{self._name}' than its tars"))
        return problems


def _checksum_problems(root: Path, entry: dict[str, Any], on_bytes: Callable[[int], None] = lambda num_bytes: None) -> list[Problem]:
    """Is the file of a manifest entry there, and is it what was written?"""
    path, digest = root / entry["file"], hashlib.sha256()
    try:
        with open_inside(root, entry["file"]) as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                on_bytes(len(block) if "beton_bytes" in entry else 0)
    except OSError as error:
        return [Problem(path, None, f"cannot be read: {error.strerror or error}")]
    if digest.hexdigest() != entry["sha256"]:
        return [Problem(path, None, "has not the checksum that the manifest says: it is damaged or was replaced")]
    return []


def _order_problems(root: Path, stream: dict[str, Any], labels_N: IntArray | None) -> list[Problem]:
    """Are the ids of a virtual stream those of samples, and its class counts exact? Not looked at where the training index is damaged."""
    path = root / stream["order"]["file"]
    try:
        order_E = npy_records(map_file(root, stream["order"]["file"]), _ORDER_DTYPE, stream["epoch_size"]).astype(np.int64)
    except OSError:
        return []  # the checksum says so
    except ValueError as error:
        return [Problem(path, None, str(error))]
    if labels_N is None:
        return []
    if order_E.max(initial=-1) >= len(labels_N):
        return [Problem(path, None, f"names sample {int(order_E.max())}, but the training split has {len(labels_N)}")]
    counts_K = np.array(stream["class_counts"], np.int64)
    if not np.array_equal(np.bincount(labels_N[order_E], minlength=len(counts_K)), counts_K):
        return [Problem(path, None, "draws other class counts than the manifest says")]
    return []


def _has_dali(stream: dict[str, Any]) -> bool:
    return not stream["materialised"] and "dali" in stream


def _dali_problems(root: Path, stream: dict[str, Any]) -> list[Problem]:
    """The index files that a virtual stream's DALI listing names; damage of the listing itself is the checksum's to say."""
    if not _has_dali(stream) or _checksum_problems(root, stream["dali"]):
        return []
    path = root / stream["dali"]["file"]
    try:
        listing = json.loads(path.read_bytes())
        paths, digests, num_samples = listing["index_paths"], listing["index_sha256"], listing["num_samples"]
        entries = [{"file": file, "sha256": digest} for file, digest in zip(paths, digests, strict=True) if _IDX_PATH.fullmatch(file)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [Problem(path, None, f"is not a listing of DALI index files ({error})")]
    if num_samples != stream["epoch_size"] or len(entries) != len(paths):
        return [Problem(path, None, "does not fit the manifest")]
    return [problem for entry in entries for problem in _checksum_problems(root, entry)]


def _strays(root: Path, manifest: dict[str, Any]) -> list[Problem]:
    """Files that nobody vouches for: they may be left over from another version of these shards."""
    known = {entry["file"] for entry in named_files(manifest)}
    known |= {stream["dali"]["file"].removesuffix(".json") for stream in manifest.get("resampled", []) if _has_dali(stream)}
    strays = sorted(path for path in root.iterdir() if path.name not in known)
    return [Problem(path, None, "is not named in the manifest", warning=True) for path in strays]
