"""The losses of stage two against their definitions, and the class weights against the reference's figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bce3s.losses.class_subset import draw_class_subset
from bce3s.retrain.class_balanced import ClassBalancedBCE, CrossEntropy

KEY = torch.tensor(1234567, dtype=torch.int64)


def by_hand(logits_BK: torch.Tensor, labels_B: torch.Tensor, counts_K: torch.Tensor, beta: float, ratio: float, clamp: float) -> float:
    """method.md, "Stage two", sample by sample and class by class in float64."""
    counts = counts_K.numpy().astype(np.float64)
    weights = (1 - beta) / (1 - beta**counts)
    weights *= len(counts) / weights.sum()
    subset = draw_class_subset(labels_B, len(counts), ratio, KEY).numpy()
    z_BK = np.clip(logits_BK.numpy().astype(np.float64), -clamp, clamp)
    total = 0.0
    for row, label in zip(z_BK, labels_B.tolist(), strict=True):
        terms = [np.log1p(np.exp(-z if k == label else z)) for k, z in enumerate(row) if subset[k]]
        total += weights[label] * sum(terms)
    return total / len(z_BK)


@pytest.mark.parametrize(("ratio", "dtype"), [(0.4, torch.float32), (1.0, torch.float32), (0.4, torch.float64)])
def test_the_loss_is_that_of_the_method(ratio: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    counts_K = torch.tensor([500, 300, 120, 60, 20, 11, 7, 5, 5, 2])
    labels_B = torch.tensor([0, 0, 1, 4, 9, 9])
    logits_BK = (5 * torch.randn(6, 10, generator=generator)).to(dtype)
    logits_BK[0, 3], logits_BK[1, 2] = 90.0, -90.0  # beyond the clamp
    expected = by_hand(logits_BK, labels_B, counts_K, 0.99, ratio, 64.0)
    leaf = logits_BK.clone().requires_grad_(True)
    loss = ClassBalancedBCE(counts_K, 0.99, ratio, 64.0)(leaf * 1.0, labels_B, KEY)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # Classes out of the subset, and logits beyond the clamp, pull at nothing.
    (gradient_BK,) = torch.autograd.grad(loss, leaf)
    out_K = ~draw_class_subset(labels_B, 10, ratio, KEY)
    assert not gradient_BK[:, out_K].any()
    assert gradient_BK[0, 3] == 0


def test_every_class_of_the_batch_takes_part_whatever_the_ratio() -> None:
    labels_B = torch.arange(10)
    logits_BK = torch.zeros(10, 10, requires_grad=True)
    loss = ClassBalancedBCE(torch.full((10,), 50), 0.99, 0.1, 64.0)(logits_BK * 1.0, labels_B, KEY)
    (gradient_BK,) = torch.autograd.grad(loss, logits_BK)
    assert (gradient_BK.diagonal() < 0).all()  # traps.md A1: nobody loses the own class


def test_the_weights_have_the_figures_of_the_reference() -> None:
    counts_K = torch.tensor([int(500 * 100 ** (-k / 99)) for k in range(100)])
    for beta, ratio in ((0.99999, 99.8), (0.9999, 97.6)):  # traps.md A14
        weights_K = ClassBalancedBCE(counts_K, beta, 0.4, 64.0).weights_K
        assert (weights_K[-1] / weights_K[0]).item() == pytest.approx(ratio, abs=0.05)
        assert weights_K.mean().item() == pytest.approx(1.0)
    natural = (weights_K * counts_K).sum() / counts_K.sum()
    assert natural.item() == pytest.approx(0.20, abs=0.01)


def test_cross_entropy_takes_every_sample_alike() -> None:
    logits_BK = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(1.0))) / 2
    assert CrossEntropy()(logits_BK, torch.tensor([0, 0]), KEY).item() == pytest.approx(expected)
