"""Format `torchvision-state-dict`: for `torchvision.models.resnet50(num_classes=K).load_state_dict(...)` and its family."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from bce3s.export.formats import Format, GraphOptions, Opened
from bce3s.export.plain import Export
from bce3s.export.state_dict import TORCHVISION_NAMES, fresh_network, require_plain_fc, torchvision_state
from bce3s.models import load_pretrained
from pipelines.config import require

_NAME = "torchvision-state-dict"


def _encode(export: Export, options: GraphOptions) -> dict[str, bytes]:
    require(
        export.arch in TORCHVISION_NAMES,
        f"torchvision has no model like {export.arch}; --format {_NAME} is for {', '.join(TORCHVISION_NAMES)}, others take safetensors",
    )
    require_plain_fc(export, _NAME)
    buffer = io.BytesIO()
    torch.save(torchvision_state(export), buffer)
    return {"": buffer.getvalue()}


def _open(path: Path, export: Export) -> Opened:
    """As whoever starts from such a file would: the backbone by `load_pretrained`, which knows torchvision's names, and a linear layer."""
    network = fresh_network(export.trained.config.model, len(export.trained.class_names), export.image_size)
    load_pretrained(network.backbone, path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.fc.load_state_dict({name: state[f"fc.{name}"] for name in ("weight", "bias")})
    return Opened(network, "a network built anew")


def _usage(export: Export, options: GraphOptions, name: str) -> str:
    return f"""import torch
import torchvision

model = torchvision.models.{TORCHVISION_NAMES[export.arch]}(num_classes={len(export.trained.class_names)}).eval()
model.load_state_dict(torch.load("{name}", weights_only=True))
# images: float32 [B, 3, {export.image_size}, {export.image_size}], normalised
logits = model(images)"""


FORMAT = Format(encode=_encode, open=_open, usage=_usage, suffix=".pth")
