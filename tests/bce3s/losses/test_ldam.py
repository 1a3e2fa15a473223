"""LDAM-DRW: margins by class, scaled cosines, and the epoch from which images are reweighted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses import MixedTargets, build_loss
from bce3s.losses.ldam import class_margins
from tests.bce3s.losses.cases import COUNTS, heads_for, on_logits, random_batch, run, written_out
from tests.bce3s.losses.test_focal import weights_by_hand

IMAGES = [max(count, 1) for count in COUNTS]
SCALE, MAX_MARGIN, BETA = 10.0, 0.5, 0.99
SETTINGS = {"max_margin": MAX_MARGIN, "effective_number_beta": BETA}


def ldam(z_K: Tensor, label: int) -> Tensor:
    """Cao et al. 2019, section 3.2, of z = SCALE·cos."""
    margin = SCALE * MAX_MARGIN * (min(IMAGES) / IMAGES[label]) ** 0.25
    others = sum((z_K[k].exp() for k in range(len(z_K)) if k != label), 0 * z_K[0])
    return -((z_K[label] - margin).exp() / ((z_K[label] - margin).exp() + others)).log()


def reweighted(z_K: Tensor, label: int) -> Tensor:
    """Section 3.3, with weights whose mean over the training images is 1."""
    weights = weights_by_hand(COUNTS, BETA)
    mean = sum(weight * count for weight, count in zip(weights, IMAGES, strict=True)) / sum(IMAGES)
    return weights[label] / mean * ldam(z_K, label)


@pytest.mark.parametrize(("epoch", "label_loss"), [(7, ldam), (8, reweighted)])
@settings(max_examples=20)
@given(lam=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_it_is_its_papers_equation_before_and_after_reweighting_starts(epoch: int, label_loss: object, lam: float, seed: int) -> None:
    logits, targets = random_batch(seed=seed, lam=lam)
    found = on_logits("ldam-drw", logits, targets, COUNTS, epoch, SCALE, **SETTINGS)
    for one, other in zip(found, written_out(logits, targets, label_loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_margins_by_hand() -> None:
    """16 images and 1: fourth roots 2 and 1; no images count as one."""
    assert class_margins(torch.tensor([16, 1, 0]), 0.5).tolist() == pytest.approx([0.25, 0.5, 0.5])


def test_two_classes_by_hand() -> None:
    targets = MixedTargets(torch.tensor([0]), torch.tensor([1]), torch.tensor(0.25))
    value, _ = on_logits("ldam-drw", torch.zeros(3, 2), targets, [16, 1], 0, 10.0, max_margin=0.5)
    of_head, of_tail = math.log1p(math.exp(2.5)), math.log1p(math.exp(5.0))
    assert value.item() == pytest.approx((of_head + 2 * (0.25 * of_head + 0.75 * of_tail)) / 3)


def test_without_margins_and_weights_it_is_ce() -> None:
    logits, targets = random_batch()
    found = on_logits("ldam-drw", logits, targets, COUNTS, 9, SCALE, max_margin=0.0, effective_number_beta=0.0)
    for one, other in zip(found, on_logits("ce", logits, targets, COUNTS), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("share", "num_epochs", "first"),
    [(0.8, 200, 160), (0.7, 10, 7), (0.8, 4, 4), (0.0, 5, 0), (1.0, 5, 5), (0.55, 100, 55), (0.29, 100, 29)],
)
def test_reweighting_starts_exactly_at_its_epoch(share: float, num_epochs: int, first: int) -> None:
    loss = build_loss(LossConfig(name="ldam-drw", drw_start=share), torch.tensor([3, 2]))
    names = [loss.phase(epoch, num_epochs).name for epoch in range(num_epochs)]
    assert names == ["plain"] * first + ["reweighted"] * (num_epochs - first)
    assert not any(loss.phase(epoch, num_epochs).trains_projector for epoch in range(num_epochs))


def test_sure_rows_behind_the_largest_margin_still_learn() -> None:
    """A margin of 15 at the scale 30, in float32: the loss is exp(−15), a few of float32's steps at 1."""
    targets = MixedTargets(torch.tensor([1]), torch.tensor([1]), torch.tensor(1.0))
    logits = torch.tensor([[-30.0, 0.0]]).expand(3, 2)
    value, gradient = on_logits("ldam-drw", logits, targets, [16, 1], 0, 30.0, max_margin=0.5)
    assert value.item() == pytest.approx(math.exp(-15.0), abs=1.2e-7)
    assert gradient[0].tolist() == pytest.approx([math.exp(-15.0) / 3, -math.exp(-15.0) / 3], abs=1.2e-7)


def test_the_classifier_it_asks_for_gives_scaled_cosines_and_margins_in_their_unit() -> None:
    heads = heads_for(6, name="ldam-drw")
    output, features = run("ldam-drw", 6, heads=heads, counts=COUNTS, epoch=0)
    cosines = functional.normalize(features, dim=1) @ functional.normalize(heads.classifier.weight, dim=1).T
    generator = torch.Generator().manual_seed(1)
    torch.randn(18, 16, generator=generator)
    labels, partners = (torch.randint(0, 6, (6,), generator=generator) for _ in range(2))
    margins = class_margins(torch.tensor(COUNTS), 0.5)

    def of(rows: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(heads.classifier.scale * (rows - functional.one_hot(labels, 6) * margins), labels)

    source, mixup, cutmix = cosines.chunk(3)
    mixed = [0.3 * of(view, labels) + 0.7 * of(view, partners) for view in (mixup, cutmix)]
    torch.testing.assert_close(output.total, (of(source, labels) + mixed[0] + mixed[1]) / 3)
