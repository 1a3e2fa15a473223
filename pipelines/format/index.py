"""Names, version and record layout of the shard format: what writer and reader must agree on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.types import ShardError

FORMAT_NAME = "bce3s-shards"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"

# One record per sample, little-endian, 24 bytes. `offset` is that of the encoded image inside its tar (not of its header), `size` in bytes;
# height and width spare every loader a look into the image before it can draw a crop.
INDEX_DTYPE = np.dtype(
    [("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("label", "<i4"), ("height", "<u2"), ("width", "<u2")],
)


def shard_file(split: str, number: int) -> str:
    """Name of shard `number` of `split`."""
    return f"{split}-{number:06d}.tar"


def index_file(split: str) -> str:
    """Name of the index of `split`."""
    return f"{split}.index.npy"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(root: Path) -> tuple[dict[str, Any], str]:
    """The manifest of the shards at `root` and its fingerprint (SHA-256 of the file, hex).

    Raises:
        ShardError: no folder, no manifest, unreadable JSON, another format or version; the sentence names the path.
    """
    path = root / MANIFEST_FILE
    if not root.is_dir():
        raise ShardError(
            f"no shards at {root}: the folder does not exist; make them with 'python tools/make_shards.py --dataset NAME --out {root}'"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(
            f"{root} holds no {MANIFEST_FILE}: it is not a finished shard folder; run tools/make_shards.py --out {root} again"
        ) from None
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from error
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ShardError(f"{path} is damaged (not JSON: {error}); make the shards again with --overwrite") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_NAME:
        raise ShardError(f"{path} is not a manifest of format '{FORMAT_NAME}'")
    if manifest.get("version") != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {manifest.get('version')!r}, this program reads version {FORMAT_VERSION}; "
            "make the shards again with --overwrite"
        )
    return manifest, hashlib.sha256(content).hexdigest()
