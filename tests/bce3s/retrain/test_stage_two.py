"""Stage two of a real run: what changes, what stays to the last bit, and that kept features give what the backbone itself would."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from bce3s.config import RetrainConfig
from bce3s.losses.class_balanced import effective_number_weights
from bce3s.losses.class_subset import draw_class_subset
from bce3s.metrics import accuracy_from_counts
from bce3s.models import build_classifier
from bce3s.retrain import features
from bce3s.retrain.class_balanced import CrossEntropy
from bce3s.retrain.feeds import KeptFeatures
from bce3s.retrain.stage_two import StageTwo
from bce3s.retrain.steps import ClassifierSteps
from bce3s.runlog import read_metrics
from bce3s.train import TrainingError
from pipelines.augment.mix import channel_statistics, normalise
from pipelines.config import OrderConfig
from pipelines.format import ShardSet
from pipelines.loaders import build_loader
from pipelines.order import SampleOrder
from pipelines.randomness import Purpose, derive_key
from pipelines.types import ConfigError
from tests.bce3s.retrain.stages import RETRAIN, STAGE_ONE, retrain, stage_one_of, train_stage_one
from tests.bce3s.train.runs import console, weights

StageOneRun = tuple[Path, ShardSet]


@pytest.fixture(scope="module")
def run(make_shards: Any, tmp_path_factory: pytest.TempPathFactory) -> StageOneRun:
    shards = make_shards(val=2)
    return train_stage_one(shards, tmp_path_factory.mktemp("stage-one") / "run"), shards


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("method", ["bce", "crt", "lws"])
def test_frozen_leaves_all_but_the_classifier_to_the_last_bit(run: StageOneRun, tmp_path: Path, method: str) -> None:
    folder, shards = run
    before = weights(folder)
    retrain(folder, shards, tmp_path / "two", replace(RETRAIN, method=method))
    assert changed(before, weights(tmp_path / "two")) == {"classifier.weight", "classifier.bias"}
    assert not changed(before, weights(folder))


def test_updated_moves_batch_norms_statistics_and_no_other_weight(run: StageOneRun, tmp_path: Path) -> None:
    folder, shards = run
    retrain(folder, shards, tmp_path / "two", replace(RETRAIN, batch_norm="updated", epochs=1))
    moved = changed(weights(folder), weights(tmp_path / "two")) - {"classifier.weight", "classifier.bias"}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {name for name in weights(folder) if name.endswith(statistics)}
    assert moved


def test_equal_seeds_give_equal_bits_and_others_do_not(run: StageOneRun, tmp_path: Path) -> None:
    folder, shards = run
    for name in ("one", "two"):
        retrain(folder, shards, tmp_path / name)
    assert not changed(weights(tmp_path / "one"), weights(tmp_path / "two"))
    stage_one = stage_one_of(folder, shards)
    StageTwo(replace(stage_one, config=replace(stage_one.config, seed=5)), RETRAIN, console()).run(tmp_path / "three")
    assert changed(weights(tmp_path / "one"), weights(tmp_path / "three"))


def test_kept_features_give_what_the_backbone_gives_at_every_step(run: StageOneRun, tmp_path: Path) -> None:
    """Written anew from method.md: images through the backbone in evaluation mode at each step, plain softplus, torch's own SGD."""
    folder, shards = run
    stage_one = stage_one_of(folder, shards)
    config, model, counts_K = stage_one.config, stage_one.model.eval(), torch.from_numpy(shards.class_counts("train"))
    order = OrderConfig(partner="same")
    loader = build_loader(shards, "train", replace(config.data, order=order), seed=config.seed, device=torch.device("cpu"))
    images_AN = [torch.zeros(shards.num_samples("train"), 16, 16, 3, dtype=torch.uint8) for _ in range(3)]
    for number in range(2):
        for batch in loader.epoch(STAGE_ONE.epochs + number):
            for stream, (ids_B, pixels) in enumerate(zip(np.split(batch.ids_S, 2), batch.images_SHWC.chunk(2), strict=True)):
                if 2 * number + stream < 3:
                    images_AN[2 * number + stream][ids_B] = pixels
    loader.close()
    mean, std = channel_statistics(config.data.augment, torch.device("cpu"))
    labels_N, weights_K = torch.from_numpy(shards.split("train").labels_N), effective_number_weights(counts_K, 0.99999)
    sample_order = SampleOrder(labels_N.numpy(), 4, 2, config.seed, OrderConfig())  # two images: the subset is more than they
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=1.0, momentum=0.9)
    for epoch in range(3):
        for step, ids in enumerate(torch.from_numpy(sample_order.instance_epoch(STAGE_ONE.epochs + epoch)).split(2)):
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * (epoch + step / sample_order.num_steps) / 3))
            key = torch.tensor(derive_key(config.seed, STAGE_ONE.epochs + epoch, step, Purpose.CLASS_SUBSET) >> 1)
            subset_K = draw_class_subset(labels_N[ids], 4, 0.75, key)
            z_BK = model(normalise(images_AN[epoch][ids], mean, std, torch.float32).contiguous())
            signs_BK = 1 - 2 * functional.one_hot(labels_N[ids], 4)
            rows_B = (functional.softplus(signs_BK * z_BK) * subset_K).sum(1)
            optimizer.zero_grad()
            (weights_K[labels_N[ids]] * rows_B).mean().backward()
            optimizer.step()
    retrain(folder, shards, tmp_path / "two", replace(RETRAIN, batch_size=2, augmented_epochs=3, negative_ratio=0.75))
    torch.testing.assert_close(weights(tmp_path / "two")["classifier.weight"], model.classifier.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(tmp_path / "two")["classifier.bias"], model.classifier.bias.detach(), rtol=1e-4, atol=1e-6)


def test_the_two_streams_are_different_augmentations_of_one_image(run: StageOneRun) -> None:
    folder, shards = run
    stage_one = stage_one_of(folder, shards)
    data = replace(stage_one.config.data, order=OrderConfig(partner="same"))
    loader = build_loader(shards, "train", data, seed=0, device=torch.device("cpu"))
    backbone = features.FrozenBackbone(stage_one.model, data.augment, stage_one.placement)
    labels_N = shards.split("train").labels_N
    kept = features.training_features(backbone, loader, labels_N, 0, 2, lambda: None)
    alone = features.training_features(backbone, loader, labels_N, 0, 1, lambda: None)
    loader.close()
    torch.testing.assert_close(kept[:1], alone)
    assert kept.abs().sum(2).gt(0).all()  # every image has its row
    assert not torch.isclose(kept[0], kept[1]).all(1).any()


def test_an_image_that_is_lost_has_the_features_of_another_of_its_class() -> None:
    features_AND = torch.arange(5.0)[None, :, None]
    labels_N, seen_N = np.array([0, 1, 0, 1, 1]), np.array([True, False, True, True, True])
    assert features._completed(features_AND, labels_N, seen_N)[0, :, 0].tolist() == [0.0, 3.0, 2.0, 3.0, 4.0]


def test_features_that_do_not_fit_are_fewer_or_a_sentence(run: StageOneRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shards = run
    epoch_bytes = shards.num_samples("train") * 64 * 4
    monkeypatch.setattr(features, "free_bytes", lambda device: 2 * epoch_bytes)
    two = retrain(folder, shards, tmp_path / "two", replace(RETRAIN, epochs=2))
    assert "features of 1 augmented epochs are kept instead of 2" in two._console.file.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr(features, "free_bytes", lambda device: epoch_bytes)
    with pytest.raises(ConfigError, match="take --batch-norm updated"):
        retrain(folder, shards, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_broken_loss_is_a_sentence_and_writes_nothing(run: StageOneRun, tmp_path: Path) -> None:
    stage_one = stage_one_of(*run)
    with torch.no_grad():
        stage_one.model.classifier.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite in epoch 1 of stage two; lower --lr"):
        StageTwo(stage_one, RETRAIN, console()).run(tmp_path / "two")
    assert list(tmp_path.iterdir()) == []


def test_the_record_names_where_it_started(run: StageOneRun, tmp_path: Path) -> None:
    folder, shards = run
    retrain(folder, shards, tmp_path / "two", replace(RETRAIN, method="lws"))
    record = json.loads((tmp_path / "two" / "environment.json").read_text())
    saved = json.loads((tmp_path / "two" / "config.json").read_text())
    lines = read_metrics(tmp_path / "two")
    assert record["stage"] == 2
    assert record["stage_one"]["checkpoint"] == lines[-1]["stage_one_checkpoint"]
    assert Path(record["stage_one"]["checkpoint"]).is_relative_to(folder)
    assert (saved["model"]["classifier"], saved["retrain"]["method"]) == ("linear", "lws")
    assert [line["kind"] for line in lines] == ["epoch"] * 3 + ["summary"]
    assert lines[0]["split"] == "val"


def test_class_balanced_retraining_on_kept_features_raises_the_tail() -> None:
    """Four classes, 200 to 4 features each, well apart but for a classifier that says "head" of everything."""
    generator = torch.Generator().manual_seed(0)
    counts_K = np.array([200, 40, 10, 4])
    labels_N = torch.from_numpy(np.repeat(np.arange(4), counts_K))
    centres_KD = 3 * torch.randn(4, 8, generator=generator)
    features_ND = centres_KD[labels_N] + torch.randn(len(labels_N), 8, generator=generator)
    test_labels = torch.arange(4).repeat(50)
    test_ND = centres_KD[test_labels] + torch.randn(200, 8, generator=generator)
    torch.manual_seed(0)
    classifier = build_classifier("linear", 8, 4)
    with torch.no_grad():
        classifier.bias[0] = 50.0

    def tail() -> float:
        right = classifier(test_ND).argmax(1) == test_labels
        correct_K = torch.bincount(test_labels[right], minlength=4).numpy()
        found = accuracy_from_counts(correct_K, np.full(4, 50), counts_K).few
        assert found is not None
        return found

    assert tail() == 0.0
    with torch.no_grad():
        classifier.reset_parameters()
    config = RetrainConfig(method="crt", batch_size=16, learning_rate=0.05, epochs=5)
    order = SampleOrder(labels_N.numpy(), 4, 16, 0, OrderConfig(sampling="class-balanced"))
    feed = KeptFeatures(features_ND[None], order, labels_N, 0, is_balanced=True)
    drawn_K = torch.bincount(torch.cat([labels_B for _, labels_B in feed.epoch(0)]), minlength=4)
    assert drawn_K.max() < 2 * drawn_K.min()
    steps = ClassifierSteps(classifier, CrossEntropy(), config, 0, 0)
    losses = [float(steps.epoch(feed, epoch)) for epoch in range(5)]
    assert losses[-1] < losses[0]
    assert tail() > 90.0


def test_max_norm_holds_after_every_epoch(run: StageOneRun, tmp_path: Path) -> None:
    folder, shards = run
    lengths_K = weights(folder)["classifier.weight"].norm(dim=1)
    threshold = lengths_K.min() + 0.1 * (lengths_K.max() - lengths_K.min())
    retrain(folder, shards, tmp_path / "two", replace(RETRAIN, max_norm=0.1))
    assert weights(tmp_path / "two")["classifier.weight"].norm(dim=1).max() <= threshold * (1 + 1e-6)
