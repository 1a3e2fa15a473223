"""Format `safetensors`: the weights of inference and what belongs to them in one file, without pickle; `load_exported` reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch

from bce3s.config import ModelConfig, from_dict
from bce3s.export.formats import Format, GraphOptions, Opened
from bce3s.export.plain import METADATA_VERSION, Export, PlainNetwork
from bce3s.export.state_dict import fresh_network
from pipelines.types import IntArray, UserError


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A network that was exported, ready for use.

    Args:
        network: normalised images, float32 [B, 3, H, W], to logits [B, K]; on the CPU, in evaluation mode.
        arch: name of the backbone.
        class_names: K names.
        class_counts_K: int64 [K], training images.
        image_size: side in pixels of what it was evaluated on.
        mean, std: per channel, on the scale 0…1.
        eval_crop: fraction of the shorter side that the centre crop keeps.
        dataset, method: what it was trained on, and how.
    """

    network: PlainNetwork
    arch: str
    class_names: tuple[str, ...]
    class_counts_K: IntArray
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    eval_crop: float
    dataset: str
    method: str


def load_exported(path: Path | str) -> Exported:
    """Reads a file of `bce3s export --format safetensors`.

    A backbone `package.module:factory` is built by that code, which is imported.

    Raises:
        UserError: missing, damaged, or another kind of file; names the path.
        ConfigError: its backbone cannot be built here.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); write it with 'bce3s export RUN --format safetensors'") from error
    if metadata.get("format") != "bce3s-export" or metadata.get("version") != METADATA_VERSION:
        raise UserError(
            f"{path} is no exported network of version {METADATA_VERSION}; write one with 'bce3s export RUN --format safetensors'"
        )
    texts = ("arch", "dataset", "method")
    values: dict[str, Any] = {name: json.loads(metadata[name]) for name in _VALUES}
    class_names = tuple(values["class_names"])
    network = fresh_network(
        from_dict(ModelConfig, values["model"]), len(class_names), values["image_size"], unit_features=values["unit_features"]
    )
    network.load_state_dict(weights)
    return Exported(
        network=network,
        class_names=class_names,
        class_counts_K=np.array(values["class_counts"], dtype=np.int64),
        image_size=values["image_size"],
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        eval_crop=values["eval_crop"],
        **{name: metadata[name] for name in texts},
    )


_VALUES = ("class_names", "class_counts", "image_size", "mean", "std", "eval_crop", "unit_features", "model")


def _encode(export: Export, options: GraphOptions) -> dict[str, bytes]:
    return {"": safetensors.torch.save(export.network.weights(), export.metadata())}


def _open(path: Path, export: Export) -> Opened:
    return Opened(load_exported(path).network, "load_exported")


def _usage(export: Export, options: GraphOptions, name: str) -> str:
    return f"""from bce3s.export import load_exported

exported = load_exported("{name}")
# images: float32 [B, 3, {export.image_size}, {export.image_size}], normalised
logits = exported.network(images)
names = [exported.class_names[k] for k in logits.argmax(1)]"""


FORMAT = Format(encode=_encode, open=_open, usage=_usage, suffix=".safetensors")
