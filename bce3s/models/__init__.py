"""Networks by name: `ARCHS` lists the backbones, `build_recogniser` puts the heads on one.

To add a backbone, subclass `Backbone` and give it a row in `ARCHS`. Others need no row: `timm:NAME`, or `package.module:factory` of one's
own (external.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from bce3s.config import ModelConfig
from bce3s.heads import CosineClassifier, FeatureMemory, LinearClassifier, NormalizedClassifier, Projector, build_classifier
from bce3s.models.backbone import Backbone, load_pretrained
from bce3s.models.external import FORMS, build_external
from bce3s.models.recogniser import Recogniser
from bce3s.models.resnet import ResNet
from bce3s.models.resnet_cifar import ResNetCifar
from pipelines.config import require, require_choice

__all__ = [
    "ARCHS",
    "ArchEntry",
    "Backbone",
    "CosineClassifier",
    "FeatureMemory",
    "LinearClassifier",
    "NormalizedClassifier",
    "Projector",
    "Recogniser",
    "build_backbone",
    "build_classifier",
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
    "resnet8-cifar": ArchEntry(partial(ResNetCifar, 8), 32, "ResNet-8 for CIFAR, 16-32-64 channels, 0.075 M parameters"),
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


def build_backbone(config: ModelConfig, image_sides: tuple[int, ...] = ()) -> Backbone:
    """Builds the backbone that `config.arch` names, with the weights that `config.pretrained` names.

    Args:
        config: backbone and its weights; the rest is not read.
        image_sides: px, of the images of the run, those of evaluation first: a network from elsewhere is built for them and tried on them.

    Raises:
        ConfigError: unknown `arch` (lists the names), a network from elsewhere that does not do, or weights that are absent, damaged or
            do not fit.
        BackendError: timm is asked for and not installed.
    """
    if ":" in config.arch:
        return build_external(config.arch, config.pretrained, image_sides)
    require_choice("arch", config.arch, (*ARCHS, *FORMS))
    backbone = ARCHS[config.arch].build()
    if config.pretrained:
        load_pretrained(backbone, Path(config.pretrained))
    return backbone


def build_recogniser(
    config: ModelConfig,
    num_classes: int,
    build_head: Callable[[int, int], nn.Module | None] = lambda feature_dim, num_classes: None,
    image_sides: tuple[int, ...] = (),
) -> Recogniser:
    """Builds the network of a run.

    Args:
        config: backbone, classifier and sizes; "auto" is the normalised classifier; pretrained weights are the backbone's alone.
        num_classes: K.
        build_head: from feature dimension and K to the layers of the method's own.
        image_sides: px, of the images of the run, those of evaluation first.

    Raises:
        ConfigError, BackendError: as `build_backbone`.
    """
    require(num_classes >= 1, f"num_classes must be at least 1, not {num_classes}")
    backbone = build_backbone(config, image_sides)
    dim = backbone.feature_dim
    classifier = build_classifier(config.classifier, dim, num_classes, config.classifier_scale, bias_prior=config.bias_prior)
    return Recogniser(backbone, num_classes, config.projection_dim, classifier, build_head(dim, num_classes))
