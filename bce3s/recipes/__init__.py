"""Recipes: one function per result one can ask for, named <dataset>_<model>_<epochs>ep; its docstring says what to expect, and from whom.

A recipe is a starting point: the command line's flags and `--set` change single values of it. Every recipe trains every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bce3s.config import TrainConfig
from bce3s.recipes.cifar import (
    cifar10lt_resnet20_40ep,
    cifar10lt_resnet34_100ep,
    cifar10lt_resnet34_320ep,
    cifar100lt_resnet34_100ep,
    cifar100lt_resnet34_320ep,
)
from bce3s.recipes.class_scaling import contrastive_weight
from bce3s.recipes.large import (
    folder_resnet50_100ep,
    imagenetlt_resnet50_180ep,
    imagenetlt_resnext50_180ep,
    inat18_resnet50_100ep,
    placeslt_resnet50_100ep,
)
from bce3s.recipes.small import demo_resnet20_12ep
from pipelines.config import require_choice

__all__ = ["DEFAULT_RECIPES", "RECIPES", "build_recipe", "contrastive_weight"]

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        demo_resnet20_12ep,
        cifar10lt_resnet20_40ep,
        cifar10lt_resnet34_100ep,
        cifar10lt_resnet34_320ep,
        cifar100lt_resnet34_100ep,
        cifar100lt_resnet34_320ep,
        imagenetlt_resnet50_180ep,
        imagenetlt_resnext50_180ep,
        inat18_resnet50_100ep,
        placeslt_resnet50_100ep,
        folder_resnet50_100ep,
    )
}
DEFAULT_RECIPES = {
    "demo": "demo_resnet20_12ep",
    "folder": "folder_resnet50_100ep",
    "cifar10-lt": "cifar10lt_resnet34_320ep",
    "cifar100-lt": "cifar100lt_resnet34_320ep",
    "imagenet-lt": "imagenetlt_resnext50_180ep",
    "inat18": "inat18_resnet50_100ep",
    "places-lt": "placeslt_resnet50_100ep",
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
