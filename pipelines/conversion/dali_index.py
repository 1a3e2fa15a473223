"""Virtual resampled streams: finished shards read in another order, with repeats, without a copied pixel.

DALI's webdataset reader takes pairs of a tar and an index file and reads the samples that the index lists, in its order; entries may
repeat, and a tar may stand in several pairs. So that a stream takes few pairs (each may hold a file open) its order is made local:

    drawn order     M segments, cut evenly         each segment, stably sorted by tar
    E ids           |········|········|········|   |aaa bbb ccc|aa bbbb cc|aaa bb ccc|  ->  M·S pairs at most

Within a pair samples lie as they were drawn, at random. The order file holds the sorted order, so every reader sees the same stream.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.conversion.resampling import Resampling, resampled_order
from pipelines.durable import publish_folder, write_atomically
from pipelines.format.index import npy_bytes
from pipelines.format.tar import TAR_BLOCK
from pipelines.types import IntArray, ShardError

MAX_PATHS = 512  # half of the usual limit of 1024 open files; exceeded only by a split of more tars
_PIECE = 1 << 14  # samples
_PNG_FIRST_BYTE = 0x89  # a JPEG begins with 0xFF
# `ext offset size name` of each component, what NVIDIA's wds2idx writes; offsets are those of the contents, behind the tar header.
_LINES = np.array([f"{ext} %d %d %08d.{ext} cls %d %d %08d.cls\n" for ext in ("jpg", "png")], object)


def order_file(split_name: str, name: str) -> str:
    """Name of the order file of stream `name`: uint32 [E] sample ids, `numpy.save` format 1.0."""
    return f"{split_name}.{name}.order.npy"


def dali_file(split_name: str, name: str) -> str:
    """Name of the JSON with the arguments of DALI's reader for stream `name`; its index files lie in a folder beside it."""
    return f"{split_name}.{name}.dali.json"


def write_virtual(
    folder: Path,
    split_name: str,
    index: NDArray[np.void],
    shard_files: Sequence[str],
    resampling: Resampling,
    num_classes: int,
    png_N: NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """Writes a stream over finished shards as an order file and as what `fn.readers.webdataset` needs to read it.

    Args:
        folder: where the tars lie and the files go.
        split_name: "train", for file names.
        index: INDEX_DTYPE [N] of the split.
        shard_files: S names of its tars, as `index["shard"]` counts them.
        resampling: what to draw.
        num_classes: K.
        png_N: bool [N], which images are PNG; None looks at the first byte of every image drawn.

    Returns:
        The stream's manifest entry.

    Raises:
        ConfigError: the split has no samples.
        ShardError: a tar cannot be read, or the files cannot be written.
    """
    labels_N = index["label"].astype(np.int64)
    drawn_E, starts = group_by_shard(resampled_order(labels_N, num_classes, resampling), index["shard"].astype(np.int64), len(shard_files))
    if png_N is None:
        png_N = _are_png(folder, index, shard_files, drawn_E)
    try:
        order = _write_order(folder / order_file(split_name, resampling.name), drawn_E)
        listing = folder / dali_file(split_name, resampling.name)
        sha256 = _write_dali(listing, index, shard_files, drawn_E, starts, png_N)
    except OSError as error:
        raise ShardError(f"cannot write the resampled stream '{resampling.name}' to {folder}: {error.strerror or error}") from error
    return {
        **resampling.describe(drawn_E, labels_N, num_classes),
        "materialised": False,
        "order": order,
        "dali": {"file": listing.name, "sha256": sha256, "num_paths": len(starts)},
    }


def group_by_shard(order_E: IntArray, shards_N: IntArray, num_shards: int) -> tuple[IntArray, IntArray]:
    """Makes an order local: cuts it into as many segments as `MAX_PATHS` allows and sorts each by shard, stably.

    Returns:
        int64 [E], the order; and int64 [G], where in it each run of one shard within a segment starts (G ≤ max(MAX_PATHS, S)).
    """
    num_segments = max(1, MAX_PATHS // num_shards) if num_shards > 1 else 1
    segment_E = np.arange(len(order_E), dtype=np.int64) * num_segments // len(order_E)
    group_E = segment_E * num_shards + shards_N[order_E]
    permutation_E = np.argsort(group_E, kind="stable")
    starts = np.flatnonzero(np.diff(group_E[permutation_E], prepend=-1))
    return order_E[permutation_E], starts.astype(np.int64)


def index_text(index: NDArray[np.void], ids: IntArray, png_N: NDArray[np.bool_]) -> bytes:
    """The index file that makes DALI read the samples `ids`, all of one tar, in this order; `index` and `png_N` are the split's [N]."""
    records = index[ids]
    sizes, offsets = records["size"].astype(np.int64), records["offset"].astype(np.int64)
    label_offsets = offsets + sizes + -sizes % TAR_BLOCK + TAR_BLOCK  # behind the padded image and the header of the label
    label_sizes = 1 + np.searchsorted(10 ** np.arange(1, 10), records["label"], side="right")  # decimal digits
    values = np.stack([offsets, sizes, ids, label_offsets, label_sizes, ids], axis=1)
    # One format call for many samples: several times faster than one for each; in pieces, as it holds a Python object for every number.
    pieces = (slice(start, start + _PIECE) for start in range(0, len(ids), _PIECE))
    lines = ["".join(_LINES[png_N[ids[piece]].astype(np.intp)]) % tuple(values[piece].ravel().tolist()) for piece in pieces]
    return "".join([f"v1.2 {len(ids)}\n", *lines]).encode()


def _are_png(folder: Path, index: NDArray[np.void], shard_files: Sequence[str], drawn_E: IntArray) -> NDArray[np.bool_]:
    png_N = np.zeros(len(index), np.bool_)
    drawn_N = np.zeros(len(index), np.bool_)
    drawn_N[drawn_E] = True
    for number, file in enumerate(shard_files):
        ids = np.flatnonzero(drawn_N & (index["shard"] == number))
        if not len(ids):
            continue
        try:
            with (folder / file).open("rb") as tar, mmap.mmap(tar.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                mapped.madvise(mmap.MADV_RANDOM)  # else reading ahead would read most of the tar
                first_bytes = [mapped[offset] for offset in index["offset"][ids].tolist()]
        except (OSError, ValueError, IndexError) as error:
            raise ShardError(f"cannot read the images of {folder / file} ({error}); copy it again or make the shards again") from error
        png_N[ids] = np.array(first_bytes) == _PNG_FIRST_BYTE
    return png_N


def _write_order(path: Path, drawn_E: IntArray) -> dict[str, str]:
    content = npy_bytes(drawn_E.astype("<u4"))
    write_atomically(path, content)
    return {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}


def _write_dali(
    listing: Path, index: NDArray[np.void], shard_files: Sequence[str], drawn_E: IntArray, starts: IntArray, png_N: NDArray[np.bool_]
) -> str:
    """Writes the index files, then the JSON that lists them; returns the JSON's SHA-256, which covers them all."""
    finished = listing.with_suffix("")
    partial = finished.with_name(finished.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    paths, index_paths, digests = [], [], []
    try:
        partial.mkdir()
        for number, ids in enumerate(np.split(drawn_E, starts[1:])):
            text = index_text(index, ids, png_N)
            file = f"{number:06d}.idx"
            with (partial / file).open("wb") as idx:
                idx.write(text)
                idx.flush()
                os.fsync(idx.fileno())
            paths.append(shard_files[int(index["shard"][ids[0]])])
            index_paths.append(f"{finished.name}/{file}")
            digests.append(hashlib.sha256(text).hexdigest())
        publish_folder(partial, finished)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    extensions = ["jpg;png", "cls"]
    content = {"paths": paths, "index_paths": index_paths, "index_sha256": digests, "ext": extensions, "num_samples": len(drawn_E)}
    encoded = json.dumps(content, indent=1).encode()
    write_atomically(listing, encoded)
    return hashlib.sha256(encoded).hexdigest()
