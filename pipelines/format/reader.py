"""Reads shards by sample id: memory-mapped tars, no copy, no parsing of tar headers."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.format.index import INDEX_DTYPE, MANIFEST_FILE, read_manifest
from pipelines.types import SPLITS, IntArray, ShardError

ByteArray = NDArray[np.uint8]
_SPLIT_KEYS = ("num_samples", "class_counts", "shards", "index")


@dataclass(frozen=True)
class ShardSet:
    """An opened shard folder.

    Args:
        root: the folder.
        manifest: its parsed manifest.json.
        fingerprint: hex SHA-256 of the manifest, which holds the checksum of every file: the identity of the data.
    """

    root: Path
    manifest: dict[str, Any]
    fingerprint: str

    @property
    def dataset(self) -> str:
        """Name of the data set the shards were made from."""
        return str(self.manifest["dataset"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names; label k is class_names[k]."""
        return tuple(self.manifest["class_names"])

    def class_counts(self, split: str = "train") -> IntArray:
        """int64 [K]: samples per class of `split`."""
        return np.array(self.manifest["splits"][split]["class_counts"], np.int64)

    def num_samples(self, split: str) -> int:
        """N of `split`, 0 if the data set has no such split."""
        return int(self.manifest["splits"][split]["num_samples"])

    def split(self, name: str) -> ShardSplit:
        """Maps the index and the tars of one split into memory."""
        return ShardSplit(self.root, name, self.manifest["splits"][name])


class ShardSplit:
    """One split, memory-mapped.

    Attributes:
        labels_N, heights_N, widths_N: int64 [N].
    """

    def __init__(self, root: Path, name: str, entry: dict[str, Any]) -> None:
        """Maps index and tars and checks their sizes against the manifest; contents are checked by checksum tools, not here."""
        self.name = name
        self._paths = [root / shard["file"] for shard in entry["shards"]]
        index_path = root / entry["index"]["file"]
        index = _load_index(index_path, int(entry["num_samples"]))
        self.labels_N: IntArray = index["label"].astype(np.int64)
        self.heights_N: IntArray = index["height"].astype(np.int64)
        self.widths_N: IntArray = index["width"].astype(np.int64)
        self._shard_N, self._offset_N, self._size_N = index["shard"], index["offset"], index["size"]
        num_classes = len(entry["class_counts"])
        if len(index) and not (0 <= self.labels_N.min() and self.labels_N.max() < num_classes and self._shard_N.max() < len(self._paths)):
            raise ShardError(f"{index_path} names labels or shards that the manifest does not have; make the shards again with --overwrite")
        self._tars = [_map_file(path, int(shard["shard_bytes"])) for path, shard in zip(self._paths, entry["shards"], strict=True)]

    def __len__(self) -> int:
        """N."""
        return len(self.labels_N)

    def encoded(self, ids: IntArray) -> list[ByteArray]:
        """The encoded images of `ids` as uint8 views into the mapped tars, no copy."""
        tars = self._tars
        shards: Sequence[int] = self._shard_N[ids].tolist()
        starts: Sequence[int] = self._offset_N[ids].tolist()
        sizes: Sequence[int] = self._size_N[ids].tolist()
        return [tars[shard][start : start + size] for shard, start, size in zip(shards, starts, sizes, strict=True)]

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages: 'sample 17 of shards/x/train-000000.tar'."""
        return f"sample {sample_id:08d} of {self._paths[int(self._shard_N[sample_id])]}"


def open_shards(root: Path) -> ShardSet:
    """Opens a shard folder.

    Raises:
        ShardError: missing or unfinished folder, damaged manifest, another format version.
    """
    manifest, fingerprint = read_manifest(root)
    missing = [key for key in ("dataset", "class_names", "splits") if key not in manifest]
    splits = manifest.get("splits")
    for name in SPLITS:
        entry = splits.get(name) if isinstance(splits, dict) else None
        missing += [f"splits.{name}.{key}" for key in _SPLIT_KEYS if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise ShardError(f"{root / MANIFEST_FILE} lacks {', '.join(missing)}; make the shards again with --overwrite")
    return ShardSet(root, manifest, fingerprint)


def _load_index(path: Path, num_samples: int) -> NDArray[np.void]:
    try:
        index = np.load(path, mmap_mode="r" if num_samples else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ShardError(f"cannot read the shard index {path}: {error}; make the shards again with --overwrite") from error
    if index.dtype != INDEX_DTYPE or index.shape != (num_samples,):
        raise ShardError(
            f"{path} does not fit the manifest ({num_samples} records of {INDEX_DTYPE.itemsize} bytes expected); make the shards again"
        )
    return index  # type: ignore[no-any-return]


def _map_file(path: Path, shard_bytes: int) -> ByteArray:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ShardError(f"cannot open shard {path}: {error}; copy it again or make the shards again") from error
    if len(mapped) != shard_bytes:
        raise ShardError(f"shard {path} has {len(mapped)} bytes, the manifest says {shard_bytes}: it is truncated; copy it again")
    return np.frombuffer(mapped, np.uint8)
