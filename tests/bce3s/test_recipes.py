"""Recipes: every one trains every method, stage two is the authors', and the weights follow the number of classes as documented."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bce3s.cli import app
from bce3s.config import LossConfig, TrainConfig, from_dict, to_json
from bce3s.device import resolve_placement
from bce3s.losses import LOSSES, build_loss, resolve_method
from bce3s.recipes import DEFAULT_RECIPES, RECIPES, build_recipe, contrastive_weight
from bce3s.step import TrainStep
from bce3s.train import build_model
from pipelines.loaders import build_loader

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {"demo": 20, "cifar10-lt": 10, "cifar100-lt": 100, "imagenet-lt": 1000, "inat18": 8142, "places-lt": 365, "folder": 100}
LARGE = [name for name, recipe in RECIPES.items() if recipe().data.image_size == 224]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resolves_with_every_method(recipe: str) -> None:
    config = RECIPES[recipe]()
    for name in LOSSES:
        resolved = resolve_method(replace(config, loss=replace(config.loss, name=name)))
        assert resolved.model.classifier != "auto"
        assert from_dict(TrainConfig, json.loads(to_json(resolved))) == resolved


@pytest.mark.parametrize("recipe", RECIPES)
def test_print_config_shows_the_recipe(recipe: str) -> None:
    dataset = RECIPES[recipe]().dataset
    found = CliRunner().invoke(app, ["fast-train", "--dataset", dataset, "--recipe", recipe, "--print-config"])
    assert found.exit_code == 0, found.output
    assert from_dict(TrainConfig, json.loads(found.output)) == resolve_method(RECIPES[recipe]())


def one_step(config: TrainConfig, shards: Any) -> dict[str, torch.Tensor]:
    """The first step behind the warm-up of the contrastive term, of four images at 32 px, with the network at its own K."""
    data = replace(config.data, loader="resident", batch_size=4, image_size=32, num_threads=1)
    config = resolve_method(replace(config, device="cpu", data=data))
    placement, num_classes = resolve_placement(config), CLASSES[config.dataset]
    loss = build_loss(config.loss, torch.ones(num_classes, dtype=torch.int64))
    step = TrainStep(build_model(config, num_classes, placement), loss, config, placement)
    step.model.feature_memory.filled_K.fill_(True)
    step.model.feature_memory.rows_KP.normal_()
    loader = build_loader(shards, "train", data, seed=config.seed, device=placement.device)
    terms = step(next(iter(loader.epoch(1))), loader.num_steps)
    assert all(torch.isfinite(value) for value in terms.values())
    return terms


SMALL = ["demo_resnet20_12ep", "cifar10lt_resnet20_40ep"]


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in RECIPES])
def test_a_recipe_takes_a_step(recipe: str, make_shards: Any) -> None:
    config = RECIPES[recipe]()
    terms = one_step(config, make_shards())
    if config.model.bias_prior:
        # A sigmoid at prior 1/K costs 1 + log K; at K·log 2, 5,600 at 8,142 classes, the first steps would be spent on the biases.
        assert terms["joint"] < 2.5 * (1 + math.log(CLASSES[config.dataset]))


def test_stage_two_is_the_authors_and_its_rate_follows_the_batch() -> None:
    for recipe in RECIPES.values():
        retrain = recipe().retrain
        assert (retrain.method, retrain.epochs, retrain.effective_number_beta, retrain.negative_ratio) == ("bce", 10, 0.99999, 0.4)
        used = retrain.resolved()
        assert used.learning_rate == pytest.approx(1e-4 * retrain.batch_size / 64)
        assert used.weight_decay == 0


def test_every_recipe_leaves_each_method_of_stage_two_its_own_rate() -> None:
    for recipe in RECIPES.values():
        for method in ("crt", "lws"):
            used = replace(recipe().retrain, method=method).resolved()
            assert (used.learning_rate, used.weight_decay) == (pytest.approx(0.2 * used.batch_size / 512), 5e-4)


def test_epochs_are_selected_on_val_only_where_the_field_has_one() -> None:
    for dataset in DEFAULT_RECIPES:
        assert build_recipe(None, dataset).select == ("val" if dataset in ("imagenet-lt", "places-lt") else "last")


def test_the_reference_recipes_keep_the_published_weights() -> None:
    for name in ("cifar10lt_resnet34_320ep", "cifar100lt_resnet34_320ep"):
        config = RECIPES[name]()
        assert config.loss == LossConfig(contrastive_weight=0.1, uniform_weight=1.0, temperature=1.0, negative_ratio=0.4)
        assert not config.model.bias_prior


def test_names_say_data_set_network_and_epochs() -> None:
    for name, recipe in RECIPES.items():
        config = recipe()
        dataset, network, epochs = name.split("_")
        assert dataset == config.dataset.replace("-", "")
        assert config.model.arch.startswith(network)
        assert epochs == f"{config.epochs}ep"


# ---- the weights and the number of classes


@pytest.fixture
def loss_scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark that measures what docs/methods.md decides on."""
    from importlib import import_module

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("loss_scale")


def test_the_contrastive_weight_is_the_published_one_up_to_ten_classes_and_falls_as_one_over_k_squared() -> None:
    assert contrastive_weight(2) == contrastive_weight(10) == 0.1
    assert contrastive_weight(100) == pytest.approx(0.001)
    assert contrastive_weight(8142) == pytest.approx(0.001 * (100 / 8142) ** 2)
    for name in [*LARGE, "cifar10lt_resnet34_100ep", "cifar100lt_resnet34_100ep"]:
        config = RECIPES[name]()
        assert config.loss.contrastive_weight == contrastive_weight(CLASSES[config.dataset])
        assert config.loss.uniform_weight == 1.0
        assert config.model.bias_prior


def test_uniform_and_joint_pull_at_the_rows_in_one_ratio_from_10_to_8142_classes(loss_scale: ModuleType) -> None:
    for build, factor in ((loss_scale.prior_state, 2.0), (loss_scale.trained_state, 4.0)):
        ratios = []
        for num_classes in (10, 100, 1000, 8142):
            torch.manual_seed(0)
            found = loss_scale.measure(build(num_classes, 64, 8))
            ratios.append(found["uniform_by_row"] / found["joint_by_row"])
        assert max(ratios) / min(ratios) < factor, ratios


def test_repulsion_times_the_age_of_the_memory_is_the_same_from_10_to_8142_classes(loss_scale: ModuleType) -> None:
    products, ratios = [], []
    for num_classes in (10, 100, 1000, 8142):
        torch.manual_seed(0)
        found = loss_scale.measure(loss_scale.prior_state(num_classes, 64, 8))
        force = contrastive_weight(num_classes) * found["contrastive_by_projections"]
        products.append(force * num_classes)
        ratios.append(force / found["joint_by_features"])
    assert max(products) / min(products) < 1.5, products
    assert max(ratios) < 0.1, ratios


def test_at_a_hundred_classes_the_published_weight_collapses_and_ours_does_not(loss_scale: ModuleType) -> None:
    weights = (0.1, contrastive_weight(100))
    published, ours = (loss_scale.memory_alignment(100, weight, batch_size=64, num_steps=100) for weight in weights)
    assert published > 0.9
    assert ours < 0.6
