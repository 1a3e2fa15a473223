"""Methods on softmax cross-entropy: plain, class-balanced, balanced softmax, logit-adjusted; all from their papers' equations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bce3s.losses import MixedTargets
from tests.bce3s.losses.cases import COUNTS, on_logits, random_batch, written_out
from tests.bce3s.losses.test_focal import weights_by_hand

IMAGES = [max(count, 1) for count in COUNTS]
PRIORS = [count / sum(IMAGES) for count in IMAGES]
BETA, TAU = 0.99, 1.7


def ce(z_K: Tensor, label: int) -> Tensor:
    return -(z_K[label].exp() / sum(z.exp() for z in z_K)).log()


def cb_ce(z_K: Tensor, label: int) -> Tensor:
    """Cui et al. 2019, section 4.1."""
    return weights_by_hand(COUNTS, BETA)[label] * ce(z_K, label)


def balanced_softmax(z_K: Tensor, label: int) -> Tensor:
    """Ren et al. 2020, eq. 3 and 4."""
    return -(IMAGES[label] * z_K[label].exp() / sum(count * z.exp() for count, z in zip(IMAGES, z_K, strict=True))).log()


def logit_adjusted(z_K: Tensor, label: int) -> Tensor:
    """Menon et al. 2021, eq. 10, in its second form: log(1 + Σ_{k≠y} (π_k/π_y)^τ·exp(z_k − z_y))."""
    others = [(PRIORS[k] / PRIORS[label]) ** TAU * (z_K[k] - z_K[label]).exp() for k in range(len(z_K)) if k != label]
    return (1 + sum(others, 0 * z_K[0])).log()


@pytest.mark.parametrize(
    ("name", "label_loss"),
    [("ce", ce), ("cb-ce", cb_ce), ("balanced-softmax", balanced_softmax), ("logit-adjusted", logit_adjusted)],
)
@settings(max_examples=20)
@given(lam=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_a_method_is_its_papers_equation(name: str, label_loss: Callable[[Tensor, int], Tensor], lam: float, seed: int) -> None:
    logits, targets = random_batch(seed=seed, lam=lam)
    found = on_logits(name, logits, targets, COUNTS, effective_number_beta=BETA, logit_adjustment=TAU)
    for one, other in zip(found, written_out(logits, targets, label_loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "of_head", "of_tail"),
    [
        # Logits of 0 and counts 3 and 1: shares ¾ and ¼, at τ = 2 in the ratio 9 : 1, and weights 3 : 1 at β near 1 that sum to 2.
        ("ce", math.log(2), math.log(2)),
        ("balanced-softmax", math.log(4 / 3), math.log(4)),
        ("logit-adjusted", math.log(10 / 9), math.log(10)),
        ("cb-ce", 0.5 * math.log(2), 1.5 * math.log(2)),
    ],
)
@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_two_classes_by_hand(name: str, of_head: float, of_tail: float, lam: float) -> None:
    targets = MixedTargets(torch.tensor([0]), torch.tensor([1]), torch.tensor(lam))
    value, _ = on_logits(name, torch.zeros(3, 2), targets, [3, 1], logit_adjustment=2.0, effective_number_beta=1 - 1e-12)
    assert value.item() == pytest.approx((of_head + 2 * (lam * of_head + (1 - lam) * of_tail)) / 3)


@pytest.mark.parametrize(
    ("name", "counts", "tau"), [("logit-adjusted", COUNTS, 0.0), ("logit-adjusted", [7] * 6, 1.0), ("balanced-softmax", [7] * 6, 1.0)]
)
def test_without_a_prior_it_is_ce(name: str, counts: list[int], tau: float) -> None:
    logits, targets = random_batch()
    found = on_logits(name, logits, targets, counts, logit_adjustment=tau)
    for one, other in zip(found, on_logits("ce", logits, targets, counts), strict=True):
        torch.testing.assert_close(one, other)


def test_at_tau_1_logit_adjustment_is_balanced_softmax() -> None:
    logits, targets = random_batch()
    found = on_logits("logit-adjusted", logits, targets, COUNTS, logit_adjustment=1.0)
    for one, other in zip(found, on_logits("balanced-softmax", logits, targets, COUNTS), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
