"""The beton of a split: found through the manifest, seen to belong to the split's tars, and watched while it is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.format.ffcv_package import import_ffcv
from pipelines.format.index import open_inside
from pipelines.format.reader import ShardSplit
from pipelines.loaders.planned import PixelRequest
from pipelines.types import IntArray, ShardError

_USER = "loader 'ffcv'"
_JPEG, _RAW = 0, 1  # what FFCV writes into a sample's `mode`


@dataclass(frozen=True, kw_only=True, eq=False)
class Beton:
    """Where the samples of a split lie in its beton.

    Args:
        path: the file.
        beton_bytes: its size.
        starts_N: int64 [N], where each sample begins; sample i is id i.
        sizes_N: int64 [N], its bytes.
        are_jpeg_N: bool [N]: JPEG, or height · width · 3 bytes of pixels.
        heights_N, widths_N: int64 [N], pixels.
        advice: what to do about damage, as the end of a sentence.
    """

    path: Path
    beton_bytes: int
    starts_N: IntArray
    sizes_N: IntArray
    are_jpeg_N: NDArray[np.bool_]
    heights_N: IntArray
    widths_N: IntArray
    advice: str

    def require_whole(self) -> None:
        """Raises `ShardError` if the file has become shorter: touching what is gone would end the process.

        A deleted file stays readable for as long as it is mapped.
        """
        try:
            num_bytes = os.stat(self.path).st_size
        except OSError:
            return
        if num_bytes < self.beton_bytes:
            raise ShardError(f"{self.path} was cut short while it was read; copy it again and continue with --resume")


def open_beton(request: PixelRequest) -> Beton:
    """The beton of the requested split, its records compared with the split's index; its images are not looked at.

    Raises:
        ShardError: there is none, it cannot be read, is damaged, or is another split's.
        BackendError: FFCV is not installed.
    """
    split, root = request.split, Path(request.shards.root)
    entry = request.shards.manifest["splits"][split.name].get("beton")
    command = f"'python tools/make_shards.py --dataset {request.shards.dataset} --out {root} --format wds,ffcv --overwrite'"
    if entry is None:
        raise ShardError(f"{root} has no beton of its '{split.name}' split, which {_USER} reads; make it with {command}")
    path, beton_bytes = root / entry["file"], int(entry["beton_bytes"])
    advice = f"copy {path} again or make it again with {command}"
    try:
        with open_inside(root, entry["file"]) as file:
            found_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"cannot open {path}: {error.strerror or error}; copy it again or make it again with {command}") from error
    if found_bytes != beton_bytes:
        raise ShardError(f"{path} has {found_bytes} bytes, the manifest says {beton_bytes}; {advice}")
    table = _read_table(path, beton_bytes, split)
    if table is None:
        raise ShardError(f"{path} does not fit the tars of its split; {advice}")
    images_N, places_N = table
    return Beton(
        path=path,
        beton_bytes=beton_bytes,
        starts_N=places_N["ptr"].astype(np.int64),
        sizes_N=places_N["size"].astype(np.int64),
        are_jpeg_N=images_N["mode"] == _JPEG,
        heights_N=split.heights_N,
        widths_N=split.widths_N,
        advice=advice,
    )


def _read_table(path: Path, beton_bytes: int, split: ShardSplit) -> tuple[NDArray[np.void], NDArray[np.void]] | None:
    """FFCV's records of the images and of their places, both [N]; None where they are not those of the split."""
    types: Any = import_ffcv("ffcv.types", _USER)
    N = len(split)
    header = np.fromfile(path, types.HeaderType, 1)
    # Before FFCV reads on, because it allocates what the header asks for.
    end = N * types.ALLOC_TABLE_TYPE.itemsize
    if (
        not len(header)
        or header[0]["num_samples"] != N
        or header[0]["num_fields"] != 2
        or header[0]["alloc_table_ptr"] + end != beton_bytes
    ):
        return None
    try:
        reader = import_ffcv("ffcv.reader", _USER).Reader(str(path))
        kinds = {name: type(field).__name__ for name, field in reader.handlers.items()}
    except (AssertionError, KeyError, ValueError):  # another version, an unknown field, a name that is none
        return None
    if kinds != {"image": "RGBImageField", "label": "IntField"}:
        return None
    images_N, labels_N, places_N = reader.metadata["f0"], reader.metadata["f1"], reader.alloc_table
    raw_N, pixel_bytes_N = images_N["mode"] == _RAW, 3 * split.heights_N * split.widths_N
    fits_N = (
        (images_N["height"] == split.heights_N)
        & (images_N["width"] == split.widths_N)
        & (np.asarray(labels_N).reshape(N) == split.labels_N)
        & (places_N["sample_id"] == np.arange(N))
        & (places_N["ptr"] == images_N["data_ptr"])
        & (raw_N | (images_N["mode"] == _JPEG))
        & (places_N["size"] == np.where(raw_N, pixel_bytes_N, split.sizes_N))
        & (places_N["size"] <= beton_bytes)
        & (places_N["ptr"] <= beton_bytes - np.minimum(places_N["size"], beton_bytes))
    )
    return (images_N, places_N) if fits_N.all() else None
