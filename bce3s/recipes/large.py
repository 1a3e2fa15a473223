"""ImageNet-LT, iNaturalist 2018, Places-LT and a user's own images, at 224 px: no BCE3S recipe is public, and none of these is measured.

They start from GLMC's, whose loop the reference shares (method.md, "Recipes for the large sets"). What is ours: biases that start at the
prior 1/K, norms and biases spared weight decay, which would pull those biases to 0, and λ_ss by the number of classes; the uniform weight
stays 1 (docs/methods.md, "How the weights scale with K"). Stage two is that of the CIFAR recipes, its rate in proportion to its batch.
"""

from __future__ import annotations

from dataclasses import replace

from bce3s.config import LossConfig, ModelConfig, OptimizerConfig, RetrainConfig, TrainConfig
from bce3s.recipes.class_scaling import contrastive_weight
from pipelines.config import AugmentConfig, DataConfig

INAT_MEAN = (0.466, 0.471, 0.380)
INAT_STD = (0.195, 0.194, 0.192)
JITTER = (0.4, 0.4, 0.4)


def imagenetlt_resnet50_180ep() -> TrainConfig:
    """ImageNet-LT, ResNet-50, selected on its val split; not measured.

    Published with ResNet-50 by others: ProCo 57.3 after 90 epochs, 57.8 after 180; PaCo 57.0 and GPaCo 58.5 after 400. BCE3S: not found.
    """
    return _imagenet_lt("resnet50")


def imagenetlt_resnext50_180ep() -> TrainConfig:
    """ImageNet-LT, ResNeXt-50 32x4d, selected on its val split; not measured.

    Published for BCE3S with this network: 58.54 (protocol not stated). Others: GLMC 56.3 (reproduced as 54.95 and 55.31), ProCo 58.0, PaCo
    58.2 and GPaCo 58.9 after 400 epochs.
    """
    return _imagenet_lt("resnext50-32x4d")


def inat18_resnet50_100ep() -> TrainConfig:
    """iNaturalist 2018, ResNet-50, 8,142 classes; not measured. Its val2018 is the field's test set, so the last epoch is the result.

    Published by others: GLMC 72.2 (120 epochs, ResNeXt-50), ProCo 73.5 (90), PaCo 73.2 and GPaCo 75.4 (400). BCE3S: figure not found.
    """
    augment = AugmentConfig(color_jitter=JITTER, mean=INAT_MEAN, std=INAT_STD)
    optimizer = _sgd(learning_rate=0.2, weight_decay=1e-4)
    return _at_224("inat18", "resnet50", 8142, batch_size=512, epochs=100, augment=augment, optimizer=optimizer)


def placeslt_resnet50_100ep() -> TrainConfig:
    """Places-LT, ResNet-50 from scratch, selected on its val split; not measured.

    The field fine-tunes a ResNet-152 from ImageNet, which is not among our networks, so its figures do not compare. Nearer to it:
    `--set model.pretrained=FILE --epochs 30 --lr 0.02`, FILE a torchvision state dict of ResNet-50.
    """
    optimizer = _sgd(learning_rate=0.1, weight_decay=5e-4)
    config = _at_224(
        "places-lt", "resnet50", 365, batch_size=256, epochs=100, augment=AugmentConfig(color_jitter=JITTER), optimizer=optimizer
    )
    return replace(config, select="val")


def folder_resnet50_100ep() -> TrainConfig:
    """A user's own images at 224 px, ResNet-50 from scratch; a starting point after GLMC's ImageNet-LT recipe, not measured here.

    λ_ss is that of a hundred classes, and safe for fewer; for more of them, K, take `--set loss.contrastive_weight` of 10/K².
    """
    optimizer = _sgd(learning_rate=0.05, weight_decay=5e-4)
    return _at_224("folder", "resnet50", 100, batch_size=128, epochs=100, augment=AugmentConfig(), optimizer=optimizer)


def _imagenet_lt(arch: str) -> TrainConfig:
    optimizer = _sgd(learning_rate=0.1, weight_decay=5e-4)
    augment = AugmentConfig(color_jitter=JITTER)
    return replace(_at_224("imagenet-lt", arch, 1000, batch_size=256, epochs=180, augment=augment, optimizer=optimizer), select="val")


def _sgd(learning_rate: float, weight_decay: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, weight_decay=weight_decay, decay_norm_and_bias=False, warmup_epochs=5)


def _at_224(
    dataset: str, arch: str, num_classes: int, *, batch_size: int, epochs: int, augment: AugmentConfig, optimizer: OptimizerConfig
) -> TrainConfig:
    """RandomResizedCrop 224, flip; evaluated at the centre 224 of a shorter side of 256, which is eval_crop's default."""
    return TrainConfig(
        dataset=dataset,
        epochs=epochs,
        data=DataConfig(batch_size=batch_size, image_size=224, augment=augment),
        model=ModelConfig(arch=arch, bias_prior=True),
        loss=LossConfig(contrastive_weight=contrastive_weight(num_classes)),
        optimizer=optimizer,
        retrain=RetrainConfig(batch_size=batch_size),
    )
