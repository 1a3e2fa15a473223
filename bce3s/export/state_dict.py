"""What formats that are weights under names share: reading them back into a network built anew, and refusing what has no such names."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bce3s.config import ModelConfig
from bce3s.export.plain import Export, PlainNetwork
from bce3s.models import build_backbone
from pipelines.config import require

TORCHVISION_NAMES = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnext50-32x4d": "resnext50_32x4d",
}
"""Backbones whose weights fit torchvision's and timm's model of that name, layer by layer."""


def fresh_network(model: ModelConfig, num_classes: int, image_size: int, *, unit_features: bool = False) -> PlainNetwork:
    """A network of that architecture with weights drawn anew, on the CPU and in evaluation mode; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(replace(model, pretrained=""), (image_size,))
        fc = nn.Linear(backbone.feature_dim, num_classes)
    return PlainNetwork(backbone, fc, unit_features=unit_features).requires_grad_(False).eval()


def torchvision_state(export: Export) -> dict[str, Tensor]:
    """The weights by torchvision's names: the backbone's own, `fc.weight` [K, D] and `fc.bias` [K]."""
    return {name.removeprefix("backbone."): tensor for name, tensor in export.network.weights().items()}


def require_plain_fc(export: Export, format_name: str) -> None:
    """Raises `ConfigError` for a cosine classifier, whose features are normalised: no plain model does that."""
    require(
        not export.network.unit_features,
        f"--format {format_name} cannot express a cosine classifier, which normalises its features; take safetensors, onnx or torchscript",
    )
