"""One checkpoint file: whole or absent, checked when read, and never executed, for it holds JSON and numbers only.

The layout is safetensors': eight bytes of length, a JSON header, the tensors' bytes. The header's metadata holds the other values of the
state and a checksum of everything. The files are written here and not by the library, whose `save_file` (0.8) goes through a second
temporary of mode 0600 and a name of its own, which a kill leaves behind, and up to 0.6 stops every Python thread until all is written.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bce3s.checkpoint.snapshot import Snapshot, Staging
from bce3s.checkpoint.tree import DTYPES, put_together, take_apart
from pipelines.durable import replacing
from pipelines.types import ConfigError, JsonValue, UserError

CHECKPOINT_FORMAT = "bce3s-checkpoint"
CHECKPOINT_VERSION = 2

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ALIGNMENT = 64  # of the tensors in the file
_METADATA = "__metadata__"
_TORCH_SAVE = b"PK"  # a zip archive
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to something else, or cannot be saved."""


class NotFinite(CheckpointError):
    """A state holds NaN or infinity and was not saved."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves a tree of dicts (keys str or int), lists, tuples, None, bool, int, finite float, str and tensors of any device and strides.

    Tensors may hold NaN; whoever must not keep a broken model checks before (`CheckpointWriter` does).

    Raises:
        NotFinite: a Python float is NaN or infinite; names the place.
        CheckpointError: the disk is full or read-only; an earlier checkpoint of that name still stands.
        TypeError: the state holds something else.
    """
    write_snapshot(path, Staging().take([take_apart(state)])[0])


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Saves a state that was taken before; raises `NotFinite` and `CheckpointError` as `save_checkpoint` does."""
    if snapshot.parts.odd_floats:
        raise NotFinite(f"cannot save {path}: {snapshot.parts.odd_floats[0]} is not finite; what was there before still stands")
    snapshot.wait()
    data = snapshot.data.numpy().data
    try:
        with replacing(path) as file:
            file.write(_header(snapshot, data))
            file.write(data)
    except OSError as error:
        raise CheckpointError(f"cannot save {path}: {error.strerror or error}; mend that, what was there before still stands") from error


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The state that was saved, its tensors contiguous and on `device`.

    Raises:
        CheckpointError: missing, unreadable, damaged, or not a checkpoint of this program and version.
    """
    header, content = _read(path)
    with _damage_of(path):
        tree, tensors = _verified(header, content)
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    with _damage_of(path):
        return put_together(tree, on_device)


def require_same_data(state: dict[str, Any], path: Path, dataset: str, fingerprint: str, shards: Path | str) -> None:
    """Raises `ConfigError` unless the checkpoint was trained on these very shards."""
    if state["dataset"] != dataset:
        raise ConfigError(
            f"{path} was trained on '{state['dataset']}', but {shards} holds '{dataset}'; name the right --shards or another --out"
        )
    if state["fingerprint"] != fingerprint:
        raise ConfigError(
            f"{path} was trained on other '{dataset}' shards than {shards} (manifests differ); name the right --shards or another --out"
        )


def _header(snapshot: Snapshot, data: memoryview) -> bytes:
    table = {
        name: {"dtype": _NAME_OF[place.dtype], "shape": list(place.shape), "data_offsets": [place.start, place.stop]}
        for name, place in snapshot.places.items()
    }
    values = json.dumps(snapshot.parts.tree, allow_nan=False)
    metadata = {
        "format": CHECKPOINT_FORMAT,
        "version": str(CHECKPOINT_VERSION),
        "values": values,
        "crc32": _checksum(values, table, data),
    }
    text = json.dumps({_METADATA: metadata, **table}).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _checksum(values: str, table: dict[str, JsonValue], data: memoryview) -> str:
    """Of all that a file says: values, names, types, shapes and places of tensors, and their bytes."""
    return f"{zlib.crc32(data, zlib.crc32(json.dumps([values, table], sort_keys=True).encode())):08x}"


def _read(path: Path) -> tuple[dict[str, JsonValue], bytes]:
    """The header, known to be of this format and version, and the whole file."""
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            if start.startswith(_TORCH_SAVE):
                raise CheckpointError(f"{path} is not a bce3s checkpoint but a file of torch.save; name one that ends in .safetensors")
            text = file.read(min(int.from_bytes(start, "little"), _MAX_HEADER_BYTES))
            with _damage_of(path):
                header = json.loads(text)
            _require_format(header, path)
            file.seek(0)
            return header, file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(f"no checkpoint at {path}; train first with 'bce3s fast-train --dataset NAME --out {path.parent}'") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; mend that and try again") from error


def _require_format(header: JsonValue, path: Path) -> None:
    metadata = header.get(_METADATA) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is not a bce3s checkpoint")
    if metadata.get("version") != str(CHECKPOINT_VERSION):
        version = metadata.get("version")
        raise CheckpointError(f"{path} has checkpoint version {version}, this program reads version {CHECKPOINT_VERSION}")


def _verified(header: dict[str, JsonValue], content: bytes) -> tuple[JsonValue, dict[str, torch.Tensor]]:
    """The values and the CPU tensors; raises nearly anything where the file is damaged."""
    import safetensors.torch  # here, so that whoever only saves does not wait for it

    table = {name: entry for name, entry in header.items() if name != _METADATA}
    metadata = header[_METADATA]
    # The library refuses what would lie outside the file; the checksum, what is merely not as it was.
    tensors: dict[str, torch.Tensor] = safetensors.torch.load(content)
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    if metadata.get("crc32") != _checksum(metadata.get("values"), table, memoryview(content)[start:]):
        raise ValueError("its checksum does not match")
    return json.loads(metadata["values"]), tensors


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Turns what the block raises into a sentence: SafetensorError, ValueError, KeyError, RecursionError and more."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from error
