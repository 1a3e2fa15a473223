"""Methods with layers, views and classifiers of their own: every part of training knows of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bce3s.checkpoint import load_checkpoint
from bce3s.config import LossConfig, ModelConfig, OptimizerConfig, TrainConfig, override
from bce3s.device import resolve_placement
from bce3s.losses import LOSSES, build_loss, loss_class, resolve_method
from bce3s.losses.seam import Share
from bce3s.models import CosineClassifier, LinearClassifier, NormalizedClassifier
from bce3s.step import TrainStep, micro_batches
from bce3s.train import Trainer, build_model, load_run, newest_checkpoint
from bce3s.train.build import average_applied
from pipelines.config import OrderConfig
from pipelines.loaders import build_loader
from pipelines.types import Batch, ConfigError
from tests.bce3s.train.runs import CONFIG as RUN
from tests.bce3s.train.runs import CPU, assert_equal_states, console, train
from tests.bce3s.train.test_ranks import Found, Trial, assert_equal_tensors, run_together, trained

OWN_LAYERS = ("glmc", "bcl")
COUNTS = (12, 9, 6, 3, 1)  # 31 images: three batches of 8 and one of 7
CONFIG = replace(
    RUN,
    epochs=2,
    eval_every=2,
    data=replace(RUN.data, batch_size=8),
    model=ModelConfig(arch="resnet8-cifar", projection_dim=16),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_epochs=0),
)


def config_of(method: str, **changes: Any) -> TrainConfig:
    return resolve_method(replace(CONFIG, loss=LossConfig(name=method), **changes))


@pytest.fixture(scope="module")
def shards(make_shards: Any) -> Any:
    return make_shards(train=COUNTS, size=(16, 16), test=2)


def step_for(config: TrainConfig) -> TrainStep:
    placement = resolve_placement(config)
    model = build_model(config, len(COUNTS), placement)
    return TrainStep(model, build_loss(config.loss, torch.tensor(COUNTS)), config, placement)


def batches_for(shards: Any, config: TrainConfig, epoch: int = 1) -> list[Batch]:
    loader = build_loader(shards, "train", config.data, seed=config.seed, device=CPU)
    batches = list(loader.epoch(epoch))
    loader.close()
    return batches


# ---- what a method decides


@pytest.mark.parametrize("method", OWN_LAYERS)
def test_the_projector_of_bce3s_rests(method: str) -> None:
    loss = build_loss(LossConfig(name=method), torch.tensor(COUNTS))
    assert {loss.phase(epoch, 10) for epoch in range(10)} == {loss.phase(0, 10)}  # one captured graph
    assert not loss.phase(0, 10).trains_projector


@pytest.mark.parametrize("method", LOSSES)
def test_a_method_is_resolved_once_and_for_all(method: str) -> None:
    config = replace(CONFIG, loss=LossConfig(name=method))
    resolved = resolve_method(config)
    assert resolve_method(resolved) == resolved
    assert resolved.model.classifier == loss_class(method).classifier != "auto"
    assert resolved.data.order.partner == ("same" if method == "bcl" else "drawn")
    assert replace(resolved, model=config.model, data=config.data) == config  # nothing else is touched


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["loss.name=bcl", "data.order.partner=drawn"], "method bcl trains on two augmentations of each image"),
        (["loss.name=ldam-drw", "model.classifier=normalized"], "method ldam-drw is defined on a cosine classifier"),
        (["loss.joint=ce"], "joint, contrastive and uniform choose the terms of method tsl, not of bce3s: add --method tsl"),
        (["loss.name=ce", "loss.uniform=off"], "joint, contrastive and uniform choose the terms of method tsl, not of ce"),
    ],
)
def test_what_a_method_would_not_heed_is_refused(settings: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve_method(override(CONFIG, settings))


@pytest.mark.parametrize(
    ("method", "classifier", "expected"),
    [
        ("bcl", "auto", CosineClassifier),
        ("bcl", "linear", LinearClassifier),
        ("glmc", "auto", LinearClassifier),
        ("glmc", "normalized", NormalizedClassifier),
        ("ce", "cosine", CosineClassifier),
    ],
)
def test_the_classifier_is_the_methods_unless_one_is_named(method: str, classifier: str, expected: type) -> None:
    config = config_of(method, model=replace(CONFIG.model, classifier=classifier, classifier_scale=16.0))
    model = build_model(config, len(COUNTS), resolve_placement(config))
    assert type(model.classifier) is expected
    assert model.classifier.scale == (16.0 if expected is CosineClassifier else 1.0)


def test_a_method_without_layers_saves_none() -> None:
    names = build_model(config_of("ce"), len(COUNTS), resolve_placement(CONFIG)).state_dict()
    assert not [name for name in names if name.startswith("method_head")]


def test_an_unknown_method_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'glcm'; known: bce3s, .*glmc"):
        resolve_method(replace(CONFIG, loss=LossConfig(name="glcm")))


# ---- one step


@pytest.mark.parametrize("method", OWN_LAYERS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_a_step_trains_all_layers_but_the_projector(shards: Any, method: str, optimizer: str) -> None:
    config = config_of(method, optimizer=OptimizerConfig(name=optimizer, learning_rate=0.01, clip_norm=5.0), ema_decay=0.9)
    step = step_for(config)
    before = {name: value.clone() for name, value in step.model.named_parameters()}
    batches = batches_for(shards, config)
    for batch in batches[:2]:
        terms = step(batch, len(batches))
    assert all(torch.isfinite(value) for value in terms.values())
    still = {name for name, value in step.model.named_parameters() if torch.equal(value, before[name])}
    assert still == {name for name in before if name.startswith("projector.")}
    assert any(name.startswith("method_head.") for name in before)
    assert step.average is not None
    averages = step.average.state_dict()["averages"]
    assert {name for name in averages if name.startswith("method_head.")} == {
        name for name, value in step.model.state_dict().items() if name.startswith("method_head.") and value.is_floating_point()
    }


@pytest.mark.parametrize("method", OWN_LAYERS)
def test_a_whole_step_reads_nothing_back_from_the_device(shards: Any, method: str) -> None:
    config = config_of(method, optimizer=OptimizerConfig(clip_norm=1.0), accumulate_steps=2, ema_decay=0.9)
    step, batches = step_for(config), batches_for(shards, config)
    step(batches[0], len(batches))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(batches[1], len(batches))
    reads = [event.key for event in profile.key_averages() if event.key in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")]
    assert reads == []


def test_a_pair_is_two_views_of_each_image_not_mixed(shards: Any) -> None:
    config = config_of("bcl")
    step, batch = step_for(config), batches_for(shards, config)[0]
    first, second = step.views(batch).chunk(2)
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (config.data.augment.mean, config.data.augment.std))
    for views, images in zip((first, second), batch.images_SHWC.chunk(2), strict=True):
        torch.testing.assert_close(views, (images.permute(0, 3, 1, 2).float() - mean) / std)
    assert not torch.equal(first, second)


def test_micro_batches_keep_pairs_together_and_contrast_within_them(shards: Any) -> None:
    """Each part's loss is that of a batch of its own; the step is their mean, weighted by images. The last batch has uneven parts."""
    config = config_of("bcl", accumulate_steps=2)
    for batch in (batches_for(shards, config)[index] for index in (0, 3)):
        step, alone = step_for(config), step_for(config)
        step.model.eval()  # batch-norm by its running statistics, so that the parts do not differ by theirs
        alone.model.eval()
        alone.schedule(batch, 4)
        expected = torch.zeros(())
        parts = micro_batches(batch, 4)
        for number, part in enumerate(parts):
            ids, other_ids = np.split(part.ids_S, 2)
            np.testing.assert_array_equal(ids, other_ids)
            weight = part.num_sources / batch.num_sources
            labels_B = batch.labels_S.chunk(2)[0]
            expected = expected + weight * alone.evaluate_loss(alone.views(part), part, labels_B, Share(number, 2, weight)).total
        alone.backward(expected)
        alone.update()
        assert step(batch, 4)["total"].item() == pytest.approx(expected.item(), rel=1e-5)
        for (name, one), other in zip(step.model.named_parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


# ---- a run: stopped, continued, evaluated


def at(epoch: int, step: int) -> Callable[[Trainer], bool]:
    return lambda trainer: (trainer.state.cursor.epoch, trainer.state.cursor.step) >= (epoch, step)


@pytest.mark.parametrize("method", OWN_LAYERS)
def test_a_run_stopped_in_mid_epoch_continues_bit_for_bit_and_evaluates(shards: Any, tmp_path: Path, method: str) -> None:
    config = replace(CONFIG, loss=LossConfig(name=method), ema_decay=0.9, accumulate_steps=2)  # as the command line has it: not resolved
    whole = train(config, shards, tmp_path / "whole")
    train(config, shards, tmp_path / "parts", stop_at=at(1, 2))
    train(config, shards, tmp_path / "parts", resume=True)
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model"]["classifier"] == loss_class(method).classifier

    path = newest_checkpoint(tmp_path / "parts")
    state = load_checkpoint(path, CPU)
    loaded_config, _, model = load_run(state, "cpu")
    images_V3HW = torch.randn(2, 3, 16, 16)
    assert whole.step.average is not None
    with average_applied(state, model, loaded_config, path), whole.step.average.applied():
        torch.testing.assert_close(model.eval()(images_V3HW), whole.model.eval()(images_V3HW), rtol=0, atol=0)
    torch.testing.assert_close(model(images_V3HW), whole.model(images_V3HW), rtol=0, atol=0)


# ---- several ranks

BY_RANKS = {"epochs": 1, "eval_every": 1, "data": replace(CONFIG.data, order=OrderConfig(drop_last=True))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def by_two(shards: Any, runs: Path) -> Found:
    return run_together(
        *(2, shards.root, runs),
        Trial(name="glmc", run="glmc", config=config_of("glmc", sync_batch_norm=True, **BY_RANKS)),
        Trial(name="bcl", run="bcl", config=config_of("bcl", **BY_RANKS), frozen_norms=True),
    )


def assert_as_alone(ranks: list[dict[str, Any]], shards: Any, trial: Trial, runs: Path) -> None:
    """The ranks hold one network, and their terms and weights are those of one process; sums in another order differ by rounding."""
    trainer = Trainer(trial.config, shards, runs / trial.run, console())
    alone = trained(trainer, trial)
    trainer.close()
    for rank in ranks:
        assert len(rank["steps"]) == len(alone["steps"]) == 3
        for found, wanted in zip(rank["steps"], alone["steps"], strict=True):
            assert found == pytest.approx(wanted, rel=1e-3)
        assert_equal_tensors(rank["model"], ranks[0]["model"])
        for name, value in alone["model"].items():
            torch.testing.assert_close(rank["model"][name], value, rtol=1e-2, atol=1e-4, msg=name)


def test_two_ranks_train_glmc_as_one_does(shards: Any, runs: Path, by_two: Found) -> None:
    assert_as_alone(by_two["glmc"], shards, Trial(name="", run="glmc-alone", config=config_of("glmc", **BY_RANKS)), runs)


def test_the_contrast_of_two_ranks_is_that_of_two_micro_batches(shards: Any, runs: Path, by_two: Found) -> None:
    config = config_of("bcl", accumulate_steps=2, **BY_RANKS)
    assert_as_alone(by_two["bcl"], shards, Trial(name="", run="bcl-alone", config=config, frozen_norms=True), runs)


@pytest.mark.slow
def test_batch_norm_of_the_methods_layers_is_synced_or_continued_rank_by_rank(shards: Any, runs: Path) -> None:
    own = config_of("bcl", ema_decay=0.9, **BY_RANKS)
    found = run_together(
        *(2, shards.root, runs),
        Trial(name="synced", run="synced", config=config_of("bcl", sync_batch_norm=True, **BY_RANKS)),
        Trial(name="own", run="own", config=own),
        Trial(name="begun", run="stopped", config=own, stop_after=2),
        Trial(name="continued", run="stopped", config=own, resume=True),
    )
    assert_equal_tensors(*(rank["model"] for rank in found["synced"]))
    one, other = (rank["model"] for rank in found["own"])
    unlike = {name for name in one if not torch.equal(one[name], other[name])}
    # The prototypes are made of the classifier's rows, which all ranks have.
    expected = {name for name in one if name.endswith(("running_mean", "running_var")) and ".prototypes." not in name}
    assert unlike == expected
    assert any(name.startswith("method_head.samples.") for name in unlike)
    for rank, whole in enumerate(found["own"]):
        assert found["begun"][rank]["steps"] + found["continued"][rank]["steps"] == whole["steps"]
        assert_equal_tensors(found["continued"][rank]["model"], whole["model"])
    assert_equal_states(runs / "own", runs / "stopped")
