"""Recipes: one function per result one can ask for, named <dataset>_<model>_<epochs>ep; its docstring says what to expect, and from whom.

A recipe is a starting point: the command line's flags and `--set` change single values of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bce3s.config import LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipelines.config import AugmentConfig, DataConfig, require_choice

# Trap B2: the reference normalises CIFAR-100 with these, CIFAR-10's mean and a widely copied std; kept for comparability.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


def _cifar_data(policy: str, cutout: int) -> DataConfig:
    """Pad-and-crop, flip, and optionally AutoAugment and Cutout, at 32 px, 64 source images a step."""
    augment = AugmentConfig(crop="pad", padding=4, policy=policy, cutout=cutout, mean=CIFAR_MEAN, std=CIFAR_STD, eval_crop=1.0)
    return DataConfig(batch_size=64, image_size=32, augment=augment)


def demo_resnet20_12ep() -> TrainConfig:
    """The embedded demo set, sized for two CPU cores and a minute or two; shows the whole path, claims nothing. Figures: README."""
    return TrainConfig(
        dataset="demo",
        epochs=12,
        data=DataConfig(loader="dali", batch_size=32, image_size=32, augment=AugmentConfig(area_range=(0.5, 1.0), eval_crop=1.0)),
        model=ModelConfig(arch="resnet20-cifar", projection_dim=64),
        optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=5e-4, warmup_epochs=1),
    )


def cifar10lt_resnet20_40ep() -> TrainConfig:
    """CIFAR10-LT on a CPU: the smallest of the field's networks, crop and flip only. Figures: benchmarks/cpu.md."""
    return TrainConfig(
        dataset="cifar10-lt",
        epochs=40,
        data=_cifar_data(policy="none", cutout=0),
        model=ModelConfig(arch="resnet20-cifar"),
        optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=5e-4, warmup_epochs=1),
    )


def cifar10lt_resnet34_320ep() -> TrainConfig:
    """The reference recipe on CIFAR10-LT. Published for imbalance factor 100: 90.08 (with flip TTA); not measured here."""
    return _reference("cifar10-lt")


def cifar100lt_resnet34_320ep() -> TrainConfig:
    """The reference recipe, stage one (method.md; the authors' log, imbalance factor 100).

    Published by the authors' log: last epoch 54.73 without TTA, 55.43 with flip TTA; best on test 55.81 with flip TTA
    (83.11 many, 56.51 medium, 23.13 few), 90 minutes, GPU not stated. Not measured here.
    """
    return _reference("cifar100-lt")


def _reference(dataset: str) -> TrainConfig:
    return TrainConfig(
        dataset=dataset,
        epochs=320,
        precision="fp32",
        data=_cifar_data(policy="autoaugment-cifar10", cutout=16),
        model=ModelConfig(arch="resnet34-small-stem"),
        loss=LossConfig(name="bce3s", contrastive_weight=0.1, uniform_weight=1.0, temperature=1.0, negative_ratio=0.4),
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=5e-3, schedule="epoch"),
    )


def folder_resnet50_100ep() -> TrainConfig:
    """A user's own images at 224 px, ResNet-50 from scratch; a starting point after GLMC's ImageNet-LT recipe, not measured here."""
    return TrainConfig(
        dataset="folder",
        epochs=100,
        data=DataConfig(batch_size=128, image_size=224),
        model=ModelConfig(arch="resnet50"),
        optimizer=OptimizerConfig(learning_rate=0.05, weight_decay=5e-4, decay_norm_and_bias=False, warmup_epochs=5),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (demo_resnet20_12ep, cifar10lt_resnet20_40ep, cifar10lt_resnet34_320ep, cifar100lt_resnet34_320ep, folder_resnet50_100ep)
}
DEFAULT_RECIPES = {
    "demo": "demo_resnet20_12ep",
    "folder": "folder_resnet50_100ep",
    "cifar10-lt": "cifar10lt_resnet34_320ep",
    "cifar100-lt": "cifar100lt_resnet34_320ep",
    "imagenet-lt": "folder_resnet50_100ep",
    "inat18": "folder_resnet50_100ep",
    "places-lt": "folder_resnet50_100ep",
    "hf": "folder_resnet50_100ep",
}


def build_recipe(name: str | None, dataset: str) -> TrainConfig:
    """The recipe `name`, or the default one of `dataset`, set to that data set.

    Raises:
        ConfigError: unknown recipe, or a data set without a default; lists the known ones.
    """
    if name is None:
        require_choice("dataset", dataset, tuple(DEFAULT_RECIPES))
        name = DEFAULT_RECIPES[dataset]
    require_choice("recipe", name, tuple(RECIPES))
    return replace(RECIPES[name](), dataset=dataset)
