"""The sigmoid focal loss, plain and class-balanced, and the weights by effective number."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bce3s.losses import MixedTargets
from bce3s.losses.class_balanced import effective_number_weights
from tests.bce3s.losses.cases import COUNTS, on_logits, random_batch, written_out

mixes = {"gamma": st.sampled_from([0.0, 0.5, 2.0, 5.0]), "lam": st.sampled_from([0.0, 0.3, 1.0]), "seed": st.integers(0, 99)}


def focal(gamma: float, weights: list[float]) -> Callable[[Tensor, int], Tensor]:
    """Lin et al. 2017, eq. 4, of every class as a question of yes or no; the image weighs by its label (Cui et al. 2019, 4.3)."""

    def label_loss(z_K: Tensor, label: int) -> Tensor:
        p_K = torch.sigmoid(z_K)
        p_true = [p_K[k] if k == label else 1 - p_K[k] for k in range(len(z_K))]
        return weights[label] * sum((-((1 - p) ** gamma) * p.log() for p in p_true), 0 * z_K[0])

    return label_loss


def weights_by_hand(counts: list[int], beta: float) -> list[float]:
    """Cui et al. 2019, eq. 2 and section 4, over the classes that have images; no images count as one."""
    raw = [(1 - beta) / (1 - beta ** max(count, 1)) for count in counts]
    present = [weight for weight, count in zip(raw, counts, strict=True) if count or not any(counts)]
    return [weight * len(present) / sum(present) for weight in raw]


@settings(max_examples=20)
@given(**mixes)
def test_focal_is_its_papers_equation(gamma: float, lam: float, seed: int) -> None:
    logits, targets = random_batch(seed=seed, lam=lam)
    found = on_logits("focal", logits, targets, COUNTS, focal_gamma=gamma)
    for one, other in zip(found, written_out(logits, targets, focal(gamma, [1.0] * 6)), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=20)
@given(**mixes, beta=st.sampled_from([0.0, 0.5, 0.99, 0.9999]))
def test_cb_focal_is_its_papers_equation(gamma: float, lam: float, seed: int, beta: float) -> None:
    logits, targets = random_batch(seed=seed, lam=lam)
    found = on_logits("cb-focal", logits, targets, COUNTS, focal_gamma=gamma, effective_number_beta=beta)
    expected = written_out(logits, targets, focal(gamma, weights_by_hand(COUNTS, beta)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_focal_by_hand() -> None:
    """Both probabilities ½, γ = 2: each class has ¼·log 2."""
    targets = MixedTargets(torch.tensor([0]), torch.tensor([1]), torch.tensor(0.7))
    value, gradient = on_logits("focal", torch.zeros(3, 2), targets, [5, 5], focal_gamma=2.0)
    assert value.item() == pytest.approx(0.5 * math.log(2))
    # d/du of (1 − σ)²·(−log σ) at 0 is −¼·log 2 − ⅛; rows are means of three.
    slope = (0.25 * math.log(2) + 0.125) / 3
    mixed = 0.3 * slope - 0.7 * slope
    assert gradient.tolist() == [pytest.approx([-slope, slope]), *[pytest.approx([mixed, -mixed])] * 2]


def test_gamma_0_is_one_hot_bce_over_all_classes() -> None:
    logits, targets = random_batch(dtype=torch.float32, lam=1.0)
    one_hot = functional.one_hot(targets.labels_B.repeat(3), 6).float()
    expected = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum") / len(logits)
    torch.testing.assert_close(on_logits("focal", logits, targets, COUNTS, focal_gamma=0.0)[0], expected)
    everything = {"negative_ratio": 1.0}
    torch.testing.assert_close(on_logits("bce", logits, targets, COUNTS, **everything)[0], expected)


def test_easy_images_fade_and_hard_ones_stay() -> None:
    targets = MixedTargets(torch.tensor([0]), torch.tensor([0]), torch.tensor(1.0))
    for z, most, least in ((6.0, 1e-4, 0.0), (-6.0, 1.0, 0.9)):
        sure = torch.tensor([[z, -40.0]]).expand(3, 2)
        plain, focused = (on_logits("focal", sure, targets, [5, 5], focal_gamma=gamma)[0].item() for gamma in (0.0, 2.0))
        assert least <= focused / plain <= most


def test_confident_logits_have_finite_gradients() -> None:
    targets = MixedTargets(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor(0.5))
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]]).repeat(3, 1)
    for gamma in (0.5, 2.0):
        value, gradient = on_logits("focal", logits, targets, [5, 5], focal_gamma=gamma)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_effective_number_weights_by_hand() -> None:
    """β = ½ and n = 1, 2: 1 and ⅔, scaled to the sum 2."""
    assert effective_number_weights(torch.tensor([1, 2]), 0.5).tolist() == pytest.approx([1.2, 0.8])


@given(counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=9), beta=st.sampled_from([0.0, 0.9, 0.9999, 0.99999]))
def test_effective_number_weights_have_mean_1_over_present_classes_and_never_rise_with_the_images(counts: list[int], beta: float) -> None:
    weights = effective_number_weights(torch.tensor(counts), beta)
    assert weights.dtype == torch.float32
    present = torch.tensor(counts) > 0
    if present.any():
        assert weights[present].mean().item() == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(weights, torch.tensor(weights_by_hand(counts, beta)), rtol=1e-5, atol=1e-7)
    by_count = [weight for _, weight in sorted(zip(counts, weights.tolist(), strict=True))]
    assert by_count == sorted(by_count, reverse=True)


def test_beta_near_1_weighs_by_one_over_the_images() -> None:
    weights = effective_number_weights(torch.tensor([500, 50, 5]), 1 - 1e-12)
    assert (weights[1:] / weights[0]).tolist() == pytest.approx([10, 100], rel=1e-6)


@pytest.mark.parametrize(("weighted", "plain"), [("cb-ce", "ce"), ("cb-focal", "focal")])
def test_beta_0_is_the_plain_loss(weighted: str, plain: str) -> None:
    logits, targets = random_batch(dtype=torch.float32)
    found = on_logits(weighted, logits, targets, COUNTS, effective_number_beta=0.0)
    for one, other in zip(found, on_logits(plain, logits, targets, COUNTS), strict=True):
        torch.testing.assert_close(one, other)
