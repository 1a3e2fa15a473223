"""Names, version and record layout of the shard format: what writer and reader must agree on."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.types import ShardError

FORMAT_NAME = "bce3s-shards"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"

# One record per sample, little-endian, 24 bytes. `offset` is that of the encoded image inside its tar (not of its header), `size` in bytes;
# height and width spare every loader a look into the image before it can draw a crop.
INDEX_DTYPE = np.dtype(
    [("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("label", "<i4"), ("height", "<u2"), ("width", "<u2")],
)

_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_MAX_MANIFEST_BYTES = 256 << 20  # 1000 times that of ImageNet-1k: what is larger is something else


def shard_file(split: str, number: int) -> str:
    """Name of shard `number` of `split`."""
    return f"{split}-{number:06d}.tar"


def index_file(split: str) -> str:
    """Name of the index of `split`."""
    return f"{split}.index.npy"


def npy_bytes(records: NDArray[Any]) -> bytes:
    """The file of an index (INDEX_DTYPE [N]) or an order (uint32 [E]), which `npy_records` reads; equal records give equal bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, records, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The manifest file; names that are not UTF-8 (of folders, say) are escaped, so that JSON gives them back as they were."""
    return (json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8", "backslashreplace")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_inside(root: Path, name: str) -> BinaryIO:
    """Opens `name` for reading, a regular file of `root`.

    A plain name may be a link to anywhere: whoever laid shards on another disk, or in a cache of blobs, made it. A name with a folder
    in it comes from a file somebody else may have written, and must stay inside.

    Raises:
        OSError: it does not exist, cannot be read, leads out of `root`, or is a pipe or a device, whose reader would wait for ever.
    """
    path = root / name
    if "/" in name and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise OSError(errno.EXDEV, "it leads out of the folder, where the file itself must lie")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


def npy_records(content: NDArray[np.uint8], dtype: np.dtype[Any], num_records: int) -> NDArray[Any]:
    """The records of a `numpy.save` file, format 1.0, as a view.

    Its header is compared with the only one that fits, not parsed: numpy's own reader evaluates it, and allocates what it asks for.

    Args:
        content: uint8, the whole file.
        dtype: of a record.
        num_records: N.

    Returns:
        [N] of `dtype`.

    Raises:
        ValueError: another kind of file, or other records; the message is a predicate of the file.
    """
    start = 10 + int.from_bytes(content[8:10].tobytes(), "little")
    if content[:8].tobytes() != _NPY_MAGIC or start > len(content):
        raise ValueError("is not a numpy file of format 1.0")
    wanted = f"{{'descr': {np.lib.format.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': ({num_records},), }}"
    if content[10:start].tobytes().rstrip() != wanted.encode() or len(content) - start != num_records * dtype.itemsize:
        raise ValueError(f"does not fit the manifest ({num_records} records of {dtype.itemsize} bytes expected)")
    return content[start:].view(dtype)


def read_manifest(root: Path) -> tuple[dict[str, Any], str]:
    """The manifest of the shards at `root` and its fingerprint (SHA-256 of the file, hex). What else it may say is `manifest.py`'s.

    Raises:
        ShardError: no folder, no manifest, unreadable JSON, another format or version; the sentence names the path.
    """
    path = root / MANIFEST_FILE
    if not root.is_dir():
        raise ShardError(
            f"no shards at {root}: the folder does not exist; make them with 'python tools/make_shards.py --dataset NAME --out {root}'"
        )
    try:
        with open_inside(root, MANIFEST_FILE) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            content = file.read(min(num_bytes, _MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        raise ShardError(
            f"{root} holds no {MANIFEST_FILE}: it is not a finished shard folder; run tools/make_shards.py --out {root} again"
        ) from None
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from error
    if num_bytes > _MAX_MANIFEST_BYTES:
        raise ShardError(f"{path} has more than {_MAX_MANIFEST_BYTES >> 20} MiB: it is not a manifest; make the shards again")
    return parse_manifest(content, path), hashlib.sha256(content).hexdigest()


def parse_manifest(content: bytes, path: Path | str) -> dict[str, Any]:
    """The manifest in the bytes of the file at `path`, a path or URL for messages.

    Raises:
        ShardError: unreadable JSON, another format or version.
    """
    try:
        manifest = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is damaged (not JSON: {error}); make the shards again with --overwrite") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_NAME:
        raise ShardError(f"{path} is not a manifest of format '{FORMAT_NAME}'")
    version = manifest.get("version")
    if version != FORMAT_VERSION:
        found = repr(version)[:40] if isinstance(version, (int, float, str)) else "that is no number"
        raise ShardError(
            f"{path} has format version {found}, this program reads version {FORMAT_VERSION}; make the shards again with --overwrite"
        )
    return manifest
