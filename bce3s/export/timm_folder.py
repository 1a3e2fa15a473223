"""Format `timm`: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens, in the layout of the Hugging Face hub."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from bce3s.export.formats import Format, GraphOptions, Opened
from bce3s.export.plain import Export
from bce3s.export.state_dict import TORCHVISION_NAMES, fresh_network, require_plain_fc, torchvision_state
from pipelines.config import require

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
OF_TIMM = "timm:"
"""What the name of a backbone that timm built starts with."""


class _Native(NamedTuple):
    """A network in timm's own words.

    Args:
        architecture: of timm's registry.
        first_conv, classifier: names of these layers.
        state: weights by timm's names.
        is_fixed: takes images of one size only, for which it must be built.
    """

    architecture: str
    first_conv: Any
    classifier: str
    state: dict[str, Tensor]
    is_fixed: bool = False


def _native(export: Export) -> _Native:
    """Raises `ConfigError` where timm has no model like it."""
    if not export.arch.startswith(OF_TIMM):
        known = f"{', '.join(TORCHVISION_NAMES)} and what --arch {OF_TIMM}… trained"
        require(
            export.arch in TORCHVISION_NAMES, f"timm has no model like {export.arch}; --format timm is for {known}, others take safetensors"
        )
        return _Native(TORCHVISION_NAMES[export.arch], "conv1", "fc", torchvision_state(export))
    model: Any = export.network.backbone  # timm's own module
    facts = model.pretrained_cfg
    classifier = facts.get("classifier")
    require(isinstance(classifier, str), f"{export.arch} has no single classifier layer in timm; take --format safetensors")
    weights = export.network.weights()
    state = {name.removeprefix("backbone."): tensor for name, tensor in weights.items() if name.startswith("backbone.")}
    state |= {f"{classifier}.{name}": weights[f"fc.{name}"] for name in ("weight", "bias")}
    architecture = export.arch.removeprefix(OF_TIMM).partition(".")[0]
    return _Native(architecture, facts.get("first_conv"), classifier, state, bool(facts.get("fixed_input_size")))


def _encode(export: Export, options: GraphOptions) -> dict[str, bytes]:
    require_plain_fc(export, "timm")
    native = _native(export)
    side, augment, num_classes = export.image_size, export.augment, len(export.trained.class_names)
    config = {
        "architecture": native.architecture,
        "num_classes": num_classes,
        "num_features": export.network.fc.in_features,
        "label_names": list(export.trained.class_names),
        "pretrained_cfg": {
            "num_classes": num_classes,
            "input_size": [3, side, side],
            "interpolation": "bilinear",
            "crop_pct": augment.eval_crop,
            "crop_mode": "center",
            "mean": list(augment.mean),
            "std": list(augment.std),
            "first_conv": native.first_conv,
            "classifier": native.classifier,
            "fixed_input_size": native.is_fixed,
        },
        **({"model_args": {"img_size": side}} if native.is_fixed else {}),
    }
    return {
        WEIGHTS_FILE: safetensors.torch.save(native.state, {"format": "pt"}),
        CONFIG_FILE: json.dumps(config, indent=1).encode(),
    }


def _open(path: Path, export: Export) -> Opened:
    """By timm itself where it can be imported; else, for what has torchvision's names, by a network built anew."""
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError):  # the latter from a torchvision that belongs to another torch
        network = fresh_network(export.trained.config.model, len(export.trained.class_names), export.image_size)
        state = safetensors.torch.load_file(path / WEIGHTS_FILE)
        network.load_state_dict({name if name.startswith("fc.") else f"backbone.{name}": tensor for name, tensor in state.items()})
        return Opened(network, "a network built anew, for timm is not installed")
    model = timm.create_model(f"local-dir:{path.absolute()}", pretrained=True)
    return Opened(model.eval(), f"timm {timm.__version__}")


def _usage(export: Export, options: GraphOptions, name: str) -> str:
    return f"""import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)  # of a PIL image
logits = model(transform(image)[None])
names = [model.pretrained_cfg["label_names"][k] for k in logits.argmax(1)]"""


FORMAT = Format(encode=_encode, open=_open, usage=_usage, suffix="")
