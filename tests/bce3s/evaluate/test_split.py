"""One pass over a split: what it counts, however it is batched, mirrored, adjusted or shared by ranks."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bce3s.config import ModelConfig
from bce3s.device import Placement
from bce3s.distributed import ALONE, World, join_world, leave_world
from bce3s.evaluate import classifier_rows, evaluate
from bce3s.losses.terms import prior_shift
from bce3s.metrics import FeatureStatistics
from bce3s.models import Recogniser, build_recogniser
from pipelines.config import AugmentConfig, DataConfig
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import build_loader
from pipelines.types import Batch, Loader
from tests.commands import finish_together
from tests.object_store import free_port

CPU = torch.device("cpu")
PLACEMENT = Placement(CPU, "fp32", False)
AUGMENT = AugmentConfig(area_range=(0.5, 1.0), eval_crop=1.0)
DATA = DataConfig(loader="resident", batch_size=16, image_size=16, num_threads=1, augment=AUGMENT)
TRAIN_COUNTS = np.array([40, 20, 9, 5])


class Fixed:
    """A loader of images that are their own logits: pixel k of row 0 is 255 where class k is predicted."""

    num_steps = 1

    def __init__(self, predicted_B: list[int], labels_B: list[int]) -> None:
        images = torch.zeros(len(labels_B), 4, 4, 3, dtype=torch.uint8)
        images[torch.arange(len(labels_B)), 0, torch.tensor(predicted_B)] = 255
        self._batch = Batch(images_SHWC=images, labels_S=torch.tensor(labels_B), ids_S=np.arange(len(labels_B)), mix=None, epoch=0, step=0)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        yield self._batch


class Reading(nn.Module):
    """Reads the logits of `Fixed` off the images, at a scale where the largest is 1 and the others 0."""

    def forward(self, images: Tensor) -> Tensor:
        values_BK = images[:, 0, 0, :]
        return (values_BK - values_BK.amin(1, keepdim=True)) / (values_BK.amax() - values_BK.amin())


def measured(data: Any, counts: np.ndarray = TRAIN_COUNTS, **options: Any) -> dict[str, Any]:
    return evaluate(Reading(), data, counts, AUGMENT, PLACEMENT, **options)  # type: ignore[return-value]


# ---- logits that are known


def test_the_mean_with_the_mirrored_image_decides_under_tta() -> None:
    # The mirrored image predicts 3 − k, so the mean has two equal logits of one half, and the first of them wins.
    found = measured(Fixed([0, 1, 2, 3], [0, 1, 2, 3]), flip_tta=True)
    assert found["plain"].per_class == (100.0, 100.0, 100.0, 100.0)
    assert found["flip_tta"].per_class == (100.0, 100.0, 0.0, 0.0)
    confidence = float(torch.tensor([0.5, 0.5, 0.0, 0.0]).softmax(0)[0])
    assert found["flip_tta"].ece == pytest.approx(100 * abs(0.5 - confidence), abs=1e-3)


def test_adjusted_logits_are_those_less_the_log_prior() -> None:
    # log(40/5) = 2.08: at τ = 1 a margin of 1 for class 0 falls to the rarest, at τ = 0.4 (0.83) it stays.
    data = Fixed([0, 0, 0], [0, 3, 3])
    kept, moved = (measured(data, adjust_logits=tau, flip_tta=True) for tau in (0.4, 1.0))
    assert kept["plain_adjusted"].per_class == (100.0, None, None, 0.0)
    assert moved["plain_adjusted"].per_class == (0.0, None, None, 100.0)
    assert moved["plain"].per_class == (100.0, None, None, 0.0)
    assert set(moved) == {"plain", "flip_tta", "plain_adjusted", "flip_tta_adjusted"}
    assert set(measured(data)) == {"plain"}


def test_the_shift_is_tau_times_the_log_of_the_prior_against_a_uniform_one() -> None:
    shift_K = prior_shift(torch.from_numpy(TRAIN_COUNTS), 0.5)
    prior_K = TRAIN_COUNTS / TRAIN_COUNTS.sum()
    np.testing.assert_allclose(shift_K, 0.5 * np.log(4 * prior_K), rtol=1e-6)
    assert prior_shift(torch.tensor([7, 7, 7]), 3.0).abs().max() < 1e-6
    assert torch.equal(prior_shift(torch.tensor([9, 0]), 1.0), prior_shift(torch.tensor([9, 1]), 1.0))


def test_the_confidence_is_of_the_asked_kind() -> None:
    data = Fixed([0, 1], [0, 1])
    softmax, sigmoid = (measured(data, confidence=kind)["plain"] for kind in ("softmax", "sigmoid"))
    assert softmax.ece == pytest.approx(100 * (1 - float(torch.tensor([1.0, 0, 0, 0]).softmax(0)[0])), abs=1e-3)
    assert sigmoid.ece == pytest.approx(100 * (1 - float(torch.tensor(1.0).sigmoid())), abs=1e-3)
    assert sigmoid.headline()["ece"] == sigmoid.to_dict()["ece"] == sigmoid.ece
    assert json.loads(json.dumps(sigmoid.to_dict()))["calibration"]["confidence"] == "sigmoid"


# ---- a network and shards


def over(shards: ShardSet, split: str = "test", world: World = ALONE, **data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracies and feature figures of a fresh network."""
    torch.manual_seed(0)
    model = build_recogniser(ModelConfig(arch="resnet8-cifar", projection_dim=4), 4)
    statistics = FeatureStatistics(4, model.backbone.feature_dim, CPU)
    loader = build_loader(
        *(shards, split, replace(DATA, **data)), seed=0, device=CPU, rank=world.rank, world_size=world.size, training=False
    )
    found = evaluate(model, loader, TRAIN_COUNTS, AUGMENT, PLACEMENT, flip_tta=True, world=world, features=statistics, confidence="sigmoid")
    loader.close()
    assert model.training
    geometry = statistics.geometry(classifier_rows(model.classifier), TRAIN_COUNTS)
    return {name: accuracy.to_dict() for name, accuracy in found.items()}, geometry.to_dict()


def assert_alike(found: Any, expected: Any, rel: float) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_alike(found[name], expected[name], rel)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, rel)
    elif expected is None or isinstance(expected, str):
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=rel, abs=rel)


@pytest.fixture(scope="module")
def shards(make_shards: Any) -> ShardSet:
    found: ShardSet = make_shards(size=(16, 16))
    return found


def test_batches_change_nothing_but_rounding(shards: ShardSet) -> None:
    # Convolutions round differently at another batch size.
    assert_alike(over(shards, batch_size=3), over(shards, batch_size=20), rel=1e-4)


@pytest.mark.parametrize("loader", ["resident", "dali", "webdataset"])
def test_training_images_are_evaluated_once_each_and_unaugmented(shards: ShardSet, loader: str) -> None:
    strong = replace(AUGMENT, crop="pad", policy="autoaugment-cifar10", cutout=8)
    seen = []
    for seed, augment in ((0, strong), (1, AUGMENT)):
        data = replace(DATA, loader=loader, augment=augment)
        opened = build_loader(shards, "train", data, seed=seed, device=CPU, training=False)
        batches = list(opened.epoch(seed))
        seen.append(torch.cat([batch.images_SHWC for batch in batches]))
        assert np.concatenate([batch.ids_S for batch in batches]).tolist() == list(range(74))
        opened.close()
    assert torch.equal(*seen)


def test_training_images_are_counted_as_any_others(shards: ShardSet) -> None:
    accuracies, geometry = over(shards, "train")
    assert (accuracies["plain"]["num_images"], geometry["num_images"]) == (74, 74)


def per_class(model: Recogniser, shards: ShardSet, precision: str) -> dict[str, Any]:
    loader = build_loader(shards, "test", DATA, seed=0, device=CPU)
    found = evaluate(model, loader, TRAIN_COUNTS, AUGMENT, Placement(CPU, precision, False), flip_tta=True)
    loader.close()
    return {name: accuracy.per_class for name, accuracy in found.items()}


def test_logits_that_bfloat16_would_tie_do_not_go_to_the_larger_class(shards: ShardSet) -> None:
    torch.manual_seed(0)
    model = build_recogniser(ModelConfig(arch="resnet8-cifar", projection_dim=4, classifier="linear"), 4)
    with torch.no_grad():
        # Features behind a ReLU are positive: the last class wins on every image, by a thousandth.
        model.classifier.weight.copy_(torch.tensor([1.0, 0.9, 0.9, 1.001])[:, None].expand_as(model.classifier.weight))
        model.classifier.bias.zero_()
    assert torch.tensor(1.001).bfloat16() == 1.0
    for precision in ("bf16", "fp32"):
        assert per_class(model, shards, precision) == dict.fromkeys(("plain", "flip_tta"), (0.0, 0.0, 0.0, 100.0))


def run_rank(rank: int, size: int, port: int, root: Path, out: Path) -> None:
    warnings.simplefilter("error")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = join_world("cpu", timeout_s=60)
    # 20 images in batches of 3: shares of one and two, and in the last batch of one.
    (out / f"{rank}.json").write_text(json.dumps(over(open_shards(root), world=world, batch_size=3)))
    leave_world()


def test_two_ranks_find_what_one_does(shards: ShardSet, tmp_path: Path) -> None:
    port, root = free_port(), Path(shards.root)
    assert finish_together(run_rank, [(rank, 2, port, root, tmp_path) for rank in range(2)]) == [0, 0]
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert found == other
    alone: Any = json.loads(json.dumps(over(shards, batch_size=1)))
    assert found[0]["plain"]["per_class"] == alone[0]["plain"]["per_class"]
    assert found[0]["flip_tta"]["calibration"]["bin_counts"] == alone[0]["flip_tta"]["calibration"]["bin_counts"]
    assert_alike(found, alone, rel=1e-4)


def test_the_loader_protocol_is_what_evaluate_needs() -> None:
    loader: Loader = Fixed([0], [0])  # checked by the type checker
    assert measured(loader)["plain"].num_images == 1
