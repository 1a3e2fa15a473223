"""Reads shards by sample id: memory-mapped tars, no copy, no parsing of tar headers. Of shards at a URL the index alone."""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.format.index import INDEX_DTYPE, MANIFEST_FILE, npy_records, open_inside, parse_manifest, read_manifest
from pipelines.format.manifest import count_faults, manifest_faults
from pipelines.format.origin import ByteArray as ByteArray
from pipelines.format.origin import LocalOrigin, Origin, open_origin
from pipelines.format.tar import TAR_BLOCK
from pipelines.types import SPLITS, IntArray, ShardError

_NAME_BYTES = 100  # the first field of a tar header
_IMAGE_NAME = re.compile(rb"[0-9]{8,}\.(jpg|png)")

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class ShardSet:
    """An opened shard folder, here or at a URL.

    Args:
        root: the folder, or the URL as text.
        manifest: its parsed manifest.json.
        fingerprint: hex SHA-256 of the manifest, which holds the checksum of every file: the identity of the data.
        origin: reads its files from any byte on.
    """

    root: Path | str
    manifest: dict[str, Any]
    fingerprint: str
    origin: Origin

    @property
    def address(self) -> str:
        """Where any process finds it again: the absolute path, or the URL."""
        return str(self.root.resolve()) if isinstance(self.root, Path) else self.root

    @property
    def dataset(self) -> str:
        """Name of the data set the shards were made from."""
        return str(self.manifest["dataset"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names; label k is class_names[k]."""
        return tuple(self.manifest["class_names"])

    def class_counts(self, split: str = "train") -> IntArray:
        """int64 [K]: samples per class of `split`, as the manifest says."""
        return np.array(self._entry(split)["class_counts"], np.int64)

    def num_samples(self, split: str) -> int:
        """N of `split`, 0 if the data set has no such split."""
        return int(self._entry(split)["num_samples"])

    def split(self, name: str) -> ShardSplit:
        """Maps the index and the tars of one split into memory; of shards at a URL reads the index.

        Raises:
            ShardError: a file is missing, damaged or does not fit the manifest; the sentence names it.
        """
        entry = self._entry(name)
        return ShardSplit(self.root, name, entry) if isinstance(self.root, Path) else RemoteSplit(self.origin, name, entry)

    def _entry(self, split: str) -> dict[str, Any]:
        if split not in SPLITS:
            raise ShardError(f"{self.root} has no split '{split}'; it has {', '.join(SPLITS)}")
        entry: dict[str, Any] = self.manifest["splits"][split]
        return entry


class ShardSplit:
    """One split, memory-mapped.

    Attributes:
        name: of the split.
        entry: its part of the manifest.
        labels_N, heights_N, widths_N: int64 [N].
        shards_N: uint32 [N], the shard of each sample, a position in `paths`.
        offsets_N: uint64 [N], where its encoded image starts there.
        sizes_N: uint32 [N], bytes of the encoded images.
        shard_bytes: int64 [shards].
        paths: of the shards; none where they lie at a URL.
    """

    paths: list[Path]
    _tars: Mapping[int, ByteArray]

    def __init__(self, root: Path, name: str, entry: dict[str, Any]) -> None:
        """Maps index and tars and checks that each record lies in its tar; contents are checked by tools/verify_shards.py, not here.

        Args:
            root: the shard folder.
            name: of the split.
            entry: the split's part of a manifest that `open_shards` accepts.

        Raises:
            ShardError: a file is missing, damaged or does not fit the manifest; the sentence names it.
        """
        self._take(name, entry, _load_index(root, entry))
        self.paths = [root / shard["file"] for shard in entry["shards"]]
        tars = [_map_shard(root, shard) for shard in entry["shards"]]
        self._tars = dict(enumerate(tars))
        self._addresses = np.array([tar.ctypes.data for tar in tars], np.int64)

    def _take(self, name: str, entry: dict[str, Any], index: NDArray[np.void]) -> None:
        self.name, self.entry = name, entry
        self.shard_bytes = np.array([shard["shard_bytes"] for shard in entry["shards"]], np.int64)
        self.labels_N: IntArray = index["label"].astype(np.int64)
        self.heights_N: IntArray = index["height"].astype(np.int64)
        self.widths_N: IntArray = index["width"].astype(np.int64)
        self.shards_N, self.offsets_N, self.sizes_N = index["shard"], index["offset"], index["size"]

    def __len__(self) -> int:
        """N."""
        return len(self.labels_N)

    def encoded(self, ids: IntArray) -> list[ByteArray]:
        """The encoded images of `ids` as uint8 views into the mapped tars, no copy."""
        tars = self._tars
        shards: Sequence[int] = self.shards_N[ids].tolist()
        starts: Sequence[int] = self.offsets_N[ids].tolist()
        sizes: Sequence[int] = self.sizes_N[ids].tolist()
        return [tars[shard][start : start + size] for shard, start, size in zip(shards, starts, sizes, strict=True)]

    def addresses(self, ids: IntArray) -> IntArray:
        """Where the encoded images of `ids` lie in this process's memory, int64 [S]."""
        found: IntArray = self._addresses[self.shards_N[ids]] + self.offsets_N[ids].astype(np.int64)
        return found

    def shrunken(self, ids: IntArray) -> IntArray:
        """The ids among `ids` whose shard is no longer as long as it was when it was mapped; touching them could end the process.

        A deleted shard stays readable for as long as it is mapped, so it is none of them.
        """
        touched = np.unique(self.shards_N[ids])
        short = [shard for shard in touched.tolist() if _file_bytes(self.paths[shard]) < self.shard_bytes[shard]]
        found: IntArray = ids[np.isin(self.shards_N[ids], short)]
        return found

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages: 'sample 00000017 of shards/x/train-000000.tar'.

        Its name in the tar is added where it is another one, because undecodable images before it were left out:
        'sample 00000017 (00000019.jpg) of …'.
        """
        shard, start = int(self.shards_N[sample_id]), int(self.offsets_N[sample_id])
        tar = self._tars.get(shard)
        member = b"" if tar is None else tar[start - TAR_BLOCK : start][:_NAME_BYTES].tobytes().rstrip(b"\0")
        other = _IMAGE_NAME.fullmatch(member) and not member.startswith(b"%08d." % sample_id)
        return f"sample {sample_id:08d}{f' ({member.decode()})' if other else ''} of {self._place(shard)}"

    def _place(self, shard: int) -> str:
        return str(self.paths[shard])


class RemoteSplit(ShardSplit):
    """One split of shards at a URL: all that the index says, and no image."""

    def __init__(self, origin: Origin, name: str, entry: dict[str, Any]) -> None:
        """Reads the index and checks it as a local one; the tars are not asked for.

        Args:
            origin: where the shards lie.
            name: of the split.
            entry: the split's part of a manifest that `open_shards` accepts.

        Raises:
            ShardError: the index cannot be had, is damaged or does not fit the manifest; the sentence names it.
        """
        self._origin = origin
        file = entry["index"]["file"]
        try:
            index = npy_records(np.frombuffer(origin.read_all(file), np.uint8), INDEX_DTYPE, entry["num_samples"])
            fault = index_fault(index, entry)
        except ValueError as error:
            if isinstance(error, ShardError):
                raise
            fault = str(error)
        if fault:
            raise ShardError(f"{origin.url(file)} {fault}; copy it there again")
        self._take(name, entry, index)
        self.paths, self._tars = [], {}

    def encoded(self, ids: IntArray) -> list[ByteArray]:
        """Always a `ShardError`: the images are not on this machine."""
        raise ShardError(f"the images of {self._place(int(self.shards_N[ids[0]]))} are not on this machine: take --loader webdataset")

    def addresses(self, ids: IntArray) -> IntArray:
        """Always a `ShardError`, as `encoded`."""
        self.encoded(ids)
        raise AssertionError("not reached")

    def shrunken(self, ids: IntArray) -> IntArray:
        """None: nothing is mapped."""
        return ids[:0]

    def _place(self, shard: int) -> str:
        return self._origin.url(self.entry["shards"][shard]["file"])


def _file_bytes(path: Path) -> float:
    try:
        return os.stat(path).st_size
    except OSError:
        return math.inf


def open_shards(location: Path | str) -> ShardSet:
    """Opens a shard folder, given by its path or by a URL: http(s)://, s3://, file:// or any other that fsspec knows.

    Raises:
        ShardError: missing or unfinished folder, damaged manifest, another format version, a server that does not answer.
        BackendError: a URL whose package is missing.
    """
    origin = open_origin(location)
    root = origin.folder if isinstance(origin, LocalOrigin) else str(location).rstrip("/")
    if isinstance(root, Path):
        manifest, fingerprint = read_manifest(root)
    else:
        content = origin.read_all(MANIFEST_FILE)
        manifest, fingerprint = parse_manifest(content, origin.url(MANIFEST_FILE)), hashlib.sha256(content).hexdigest()
    faults = manifest_faults(manifest) or count_faults(manifest)
    if faults:
        raise ShardError(f"{origin.url(MANIFEST_FILE)} {faults[0]}; copy it again or make the shards again with --overwrite")
    return ShardSet(root, manifest, fingerprint, origin)


def read_index(root: Path, entry: dict[str, Any]) -> NDArray[np.void]:
    """The index that a split's manifest entry names: INDEX_DTYPE [N], mapped; its values are not looked at.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it has not N records; the message is a predicate of the file.
    """
    return npy_records(map_file(root, entry["index"]["file"]), INDEX_DTYPE, entry["num_samples"])


def _load_index(root: Path, entry: dict[str, Any]) -> NDArray[np.void]:
    path = root / entry["index"]["file"]
    advice = f"run 'python tools/verify_shards.py {root} --repair-index'"
    try:
        index = read_index(root, entry)
    except ValueError as error:
        raise ShardError(f"{path} {error}; {advice}") from error
    except OSError as error:
        raise ShardError(f"cannot read the shard index {path}: {error.strerror or error}; {advice}") from error
    fault = index_fault(index, entry)
    if fault:
        raise ShardError(f"{path} {fault}; {advice}")
    return index


def index_fault(index: NDArray[np.void], entry: dict[str, Any]) -> str | None:
    """What makes an index unusable with the shards of its manifest entry; None if nothing does. Costs 20 ms for 437,513 records."""
    if not len(index):
        return None
    num_classes, num_shards = len(entry["class_counts"]), len(entry["shards"])
    labels_N, shards_N = index["label"], index["shard"]
    if labels_N.min() < 0 or labels_N.max() >= num_classes or shards_N.max() >= num_shards:
        return "names labels or shards that the manifest does not have"
    if (np.bincount(labels_N, minlength=num_classes) != np.array(entry["class_counts"], np.int64)).any():
        return "holds other class counts than the manifest"
    shard_bytes_N = np.array([shard["shard_bytes"] for shard in entry["shards"]], np.uint64)[shards_N]
    sizes_N, offsets_N = index["size"].astype(np.uint64), index["offset"]
    # Unsigned, so offset + size could wrap round: the size is compared first.
    outside = (sizes_N > shard_bytes_N) | (offsets_N > shard_bytes_N - np.minimum(sizes_N, shard_bytes_N)) | (offsets_N < TAR_BLOCK)
    if outside.any():
        return f"places sample {int(outside.argmax())} outside its shard"
    if not (sizes_N.all() and index["height"].all() and index["width"].all()):
        return "holds images of 0 bytes or 0 pixels"
    return None


def _map_shard(root: Path, shard: dict[str, Any]) -> ByteArray:
    path, shard_bytes = root / shard["file"], shard["shard_bytes"]
    try:
        mapped = map_file(root, shard["file"])
    except OSError as error:
        raise ShardError(f"cannot open shard {path}: {error.strerror or error}; copy it again or make the shards again") from error
    if len(mapped) != shard_bytes:
        change = "is truncated" if len(mapped) < shard_bytes else "has grown"
        raise ShardError(f"shard {path} has {len(mapped)} bytes, the manifest says {shard_bytes}: it {change}; copy it again")
    return mapped


def map_file(root: Path, name: str) -> ByteArray:
    """A file's bytes, read-only, without an open file behind them.

    Python's `mmap` keeps a copy of the descriptor as long as the map lives (until 3.13), and a set may have more shards than the usual
    1024 files a process may open; hence mmap(2) itself.
    """
    with open_inside(root, name) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if not num_bytes:
            return np.empty(0, np.uint8)
        address = _LIBC.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    pages = (ctypes.c_uint8 * num_bytes).from_address(address)
    # Not at exit: threads of a decoder may read until the very end.
    weakref.finalize(pages, _LIBC.munmap, address, num_bytes).atexit = False
    mapped: ByteArray = np.frombuffer(memoryview(pages), np.uint8)
    mapped.flags.writeable = False
    return mapped
