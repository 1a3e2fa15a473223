"""Settings: typed overrides that name what they do not know, and a JSON form that comes back equal."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from bce3s.config import TrainConfig, from_dict, override, to_json
from bce3s.recipes import DEFAULT_RECIPES, RECIPES, build_recipe
from pipelines.datasets import DATASETS
from pipelines.types import ConfigError


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_survives_json_and_says_what_to_expect(recipe: str) -> None:
    config = RECIPES[recipe]()
    assert from_dict(TrainConfig, json.loads(to_json(config))) == config
    assert RECIPES[recipe].__doc__
    assert config.dataset in DATASETS


def test_every_dataset_has_a_default_recipe() -> None:
    assert set(DEFAULT_RECIPES) == set(DATASETS)
    for dataset in DATASETS:
        assert build_recipe(None, dataset).dataset == dataset


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("epochs=7", ("epochs",), 7),
        ("optimizer.learning_rate=1", ("optimizer", "learning_rate"), 1.0),
        ("optimizer.weight_decay=2e-4", ("optimizer", "weight_decay"), 2e-4),
        ("compile=True", ("compile",), True),
        ("loss.name=ce", ("loss", "name"), "ce"),
        ("data.augment.area_range=0.25,1", ("data", "augment", "area_range"), (0.25, 1.0)),
        ("data.augment.mean=(0.5,0.5,0.5)", ("data", "augment", "mean"), (0.5, 0.5, 0.5)),
    ],
)
def test_override_sets_one_value_and_nothing_else(assignment: str, path: tuple[str, ...], value: object) -> None:
    config = RECIPES["demo_resnet20_12ep"]()
    changed = override(config, [assignment])
    found: object = changed
    for name in path:
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    before, after = flat(dataclasses.asdict(config)), flat(dataclasses.asdict(changed))
    assert [name for name in before if before[name] != after[name]] == [".".join(path)]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("epochs", "--set takes path=value"),
        ("optimizer.lr=1", r"unknown setting 'optimizer\.lr'; known: .*optimizer\.learning_rate"),
        ("optimiser.learning_rate=1", r"unknown setting 'optimiser\.learning_rate'"),
        ("epochs=many", "epochs takes a whole number, not 'many'"),
        ("epochs=1.5", r"epochs takes a whole number, not 1\.5"),
        ("compile=1", "compile takes true or false, not 1"),
        ("optimizer=3", "'optimizer' is a group of settings"),
        ('data.augment={"crop":"pad"}', r"'data\.augment' is a group of settings"),
        ("optimizer.momentum=-1", "momentum must lie in"),
        ("optimizer.learning_rate=Infinity", "learning_rate must be positive and finite"),
        ("data.order.resample_exponent=NaN", "resample_exponent must be a number"),
        ("loss.uniform_weight=-1", "uniform_weight cannot be negative"),
        ("seed=-1", "seed must lie in"),
        ("data.augment.mean=0.5,0.5", r"data\.augment\.mean takes 3 values, not 2"),
        ("precision=half", "unknown precision 'half'; known: auto, bf16, fp16, fp32"),
        ("epochs=0", "epochs must be at least 1, not 0"),
        ("data.augment.crop=random", "unknown crop 'random'; known: none, pad, resized"),
        ("optimizer.learning_rate=-1", "learning_rate must be positive"),
    ],
)
def test_bad_override_is_one_sentence(assignment: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        override(RECIPES["demo_resnet20_12ep"](), [assignment])


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'best'; known: demo_resnet20_12ep"):
        build_recipe("best", "demo")
