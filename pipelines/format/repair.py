"""Rebuilds the index of shards whose tars are whole: everything it holds stands in the tars, too."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.durable import write_atomically
from pipelines.format.examine import Problem, ShardFindings, examine_shard
from pipelines.format.index import INDEX_DTYPE, MANIFEST_FILE, manifest_bytes, npy_bytes, open_inside, read_manifest
from pipelines.format.manifest import manifest_faults, streams
from pipelines.types import ShardError


@dataclass
class Repair:
    """What was done, a sentence each, and why the rest could not be done."""

    done: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def repair_indexes(
    root: Path, *, num_threads: int = os.cpu_count() or 1, on_bytes: Callable[[int], None] = lambda num_bytes: None
) -> Repair:
    """Writes every index anew that differs from what its tars hold, and what the manifest says of it.

    A split is touched only if all its tars have the checksums of the manifest. Files are replaced one by one, each whole; the manifest
    is last, so that a killed repair can be run again.

    Args:
        root: the shard folder.
        num_threads: tars at once.
        on_bytes: called with the bytes just read, often and from several threads.

    Raises:
        ShardError: there is no usable manifest (class names and checksums stand nowhere else), or the folder cannot be written.
    """
    path = root / MANIFEST_FILE
    if root.is_dir() and not path.exists():
        raise ShardError(f"{path} cannot be rebuilt: class names and checksums stood only there; copy it or make the shards again")
    manifest, _ = read_manifest(root)
    faults = manifest_faults(manifest)
    if faults:
        raise ShardError(f"{path} {faults[0]}, so nothing can be rebuilt; copy it again or make the shards again")
    repair, before = Repair(), manifest_bytes(manifest)
    try:
        for entry in streams(manifest).values():
            index, problems = _index_of_tars(root, entry, len(manifest["class_names"]), num_threads, on_bytes)
            if problems:
                repair.problems += problems
                repair.problems.append(Problem(root / entry["index"]["file"], None, "was not rebuilt, because its tars are not whole"))
            elif _replace_index(root, entry, index, len(manifest["class_names"])):
                repair.done.append(f"rebuilt {root / entry['index']['file']} from {len(entry['shards'])} tars ({len(index)} samples)")
        if manifest_bytes(manifest) != before:
            write_atomically(path, manifest_bytes(manifest))
            repair.done.append(f"updated {path}: runs made with these shards will take them for others and refuse to resume")
    except OSError as error:
        raise ShardError(f"cannot write to {root}: {error.strerror or error}; nothing was left half-written") from error
    return repair


def _index_of_tars(
    root: Path, entry: dict[str, Any], num_classes: int, num_threads: int, on_bytes: Callable[[int], None]
) -> tuple[NDArray[np.void], list[Problem]]:
    """The index as the tars of a split say, INDEX_DTYPE [N]; and what keeps them from being believed."""

    def examine(shard: dict[str, Any], first_id: int) -> ShardFindings:
        # How many samples there are is for the tar to say: the manifest's number may be what is wrong.
        unnumbered = {**shard, "num_samples": None}
        return examine_shard(root, unnumbered, first_id=first_id, num_classes=num_classes, decode=False, on_bytes=on_bytes)

    shards = entry["shards"]
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            found = list(pool.map(examine, shards, accumulate((shard["num_samples"] for shard in shards), initial=0)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    index = np.concatenate([np.zeros(0, INDEX_DTYPE), *(findings.records_N for findings in found)])
    index["shard"] = np.repeat(np.arange(len(found)), [len(findings.records_N) for findings in found])
    return index, [problem for findings in found for problem in findings.problems if not problem.warning]


def _replace_index(root: Path, entry: dict[str, Any], index: NDArray[np.void], num_classes: int) -> bool:
    """Brings a split's index file and manifest entry in line with `index`; was the file another one?"""
    content = npy_bytes(index)
    entry["num_samples"] = len(index)
    entry["class_counts"] = np.bincount(index["label"], minlength=num_classes).tolist()
    entry["index"]["sha256"] = sha256(content).hexdigest()
    for shard, count in zip(entry["shards"], np.bincount(index["shard"], minlength=len(entry["shards"])).tolist(), strict=True):
        shard["num_samples"] = count
    try:
        with open_inside(root, entry["index"]["file"]) as file:
            if file.read(len(content) + 1) == content:
                return False
    except OSError:
        pass  # then it is to be written
    write_atomically(root / entry["index"]["file"], content)
    return True
