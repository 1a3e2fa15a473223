"""Networks by name: `ARCHS` lists the backbones, `build_recogniser` puts the heads on one.

To add a backbone, subclass `Backbone` and give it a row in `ARCHS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bce3s.models.backbone import Backbone, load_pretrained
from bce3s.models.head import FeatureMemory, NormalizedClassifier, Projector
from bce3s.models.recogniser import Recogniser
from bce3s.models.resnet import ResNet
from bce3s.models.resnet_cifar import ResNetCifar
from pipelines.config import require, require_choice

__all__ = [
    "ARCHS",
    "ArchEntry",
    "Backbone",
    "FeatureMemory",
    "NormalizedClassifier",
    "Projector",
    "Recogniser",
    "build_recogniser",
    "load_pretrained",
]


@dataclass(frozen=True)
class ArchEntry:
    """One backbone that a run can name.

    Args:
        build: makes it with fresh weights drawn from torch's global generator, on torch's default device.
        image_size: side in pixels of the images it was designed for; it accepts others.
        summary: one line for listings.
    """

    build: Callable[[], Backbone]
    image_size: int
    summary: str


ARCHS: dict[str, ArchEntry] = {
    "resnet20-cifar": ArchEntry(partial(ResNetCifar, 20), 32, "ResNet-20 for CIFAR, 16-32-64 channels, 0.27 M parameters"),
    "resnet32-cifar": ArchEntry(partial(ResNetCifar, 32), 32, "ResNet-32 for CIFAR, 16-32-64 channels, 0.46 M parameters (BCL, ProCo)"),
    "resnet44-cifar": ArchEntry(partial(ResNetCifar, 44), 32, "ResNet-44 for CIFAR, 16-32-64 channels, 0.66 M parameters"),
    "resnet56-cifar": ArchEntry(partial(ResNetCifar, 56), 32, "ResNet-56 for CIFAR, 16-32-64 channels, 0.85 M parameters"),
    "resnet32-cifar-x4": ArchEntry(partial(ResNetCifar, 32, width=4), 32, "ResNet-32 for CIFAR, 4 times as wide, 7.4 M parameters (GLMC)"),
    "resnet34-small-stem": ArchEntry(
        partial(ResNet, (3, 4, 6, 3), stem="small"), 32, "ResNet-34 with a 3x3 stem and no max-pool, 21 M parameters (the BCE3S reference)"
    ),
    "resnet18": ArchEntry(partial(ResNet, (2, 2, 2, 2)), 224, "ResNet-18, 11 M parameters"),
    "resnet34": ArchEntry(partial(ResNet, (3, 4, 6, 3)), 224, "ResNet-34, 21 M parameters"),
    "resnet50": ArchEntry(partial(ResNet, (3, 4, 6, 3), bottleneck=True), 224, "ResNet-50 v1.5, 24 M parameters"),
    "resnet101": ArchEntry(partial(ResNet, (3, 4, 23, 3), bottleneck=True), 224, "ResNet-101 v1.5, 43 M parameters"),
    "resnext50-32x4d": ArchEntry(
        partial(ResNet, (3, 4, 6, 3), bottleneck=True, groups=32, width_per_group=4), 224, "ResNeXt-50 32x4d, 23 M parameters"
    ),
}


def build_recogniser(arch: str, num_classes: int, projection_dim: int = 128, pretrained: Path | None = None) -> Recogniser:
    """Builds the network of a run.

    Args:
        arch: a name of `ARCHS`.
        num_classes: K.
        projection_dim: P, of the projector and the feature memory.
        pretrained: a torchvision state dict for the backbone; the heads start fresh.

    Raises:
        ConfigError: unknown `arch` (lists the names), a size below 1, or weights that are absent, damaged or do not fit.
    """
    require_choice("arch", arch, tuple(ARCHS))
    require(num_classes >= 1, f"num_classes must be at least 1, not {num_classes}")
    require(projection_dim >= 1, f"projection_dim must be at least 1, not {projection_dim}")
    backbone = ARCHS[arch].build()
    if pretrained is not None:
        load_pretrained(backbone, pretrained)
    return Recogniser(backbone, num_classes, projection_dim)
