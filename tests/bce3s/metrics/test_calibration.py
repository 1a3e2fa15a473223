"""Calibration: by hand, against a plain loop, and the same bits however the images come."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bce3s.config import RETRAIN_METHODS, LossConfig
from bce3s.losses import LOSSES
from bce3s.metrics import Calibration, ReliabilityBins, confidence_kind

CPU = torch.device("cpu")


def calibration(logits_BK: Tensor, right_B: Tensor, kind: str = "softmax", batches: int = 1) -> Calibration:
    bins = ReliabilityBins(CPU, kind)
    for logits, right in zip(logits_BK.chunk(batches), right_B.chunk(batches), strict=True):
        bins.add(logits, right)
    return bins.result()


def of_confidence(*confidences: float) -> Tensor:
    """Logits of two classes whose largest sigmoid is that."""
    return torch.tensor([[math.log(each / (1 - each)), -60.0] for each in confidences])


def plain_ece(confidence_N: np.ndarray, right_N: np.ndarray, num_bins: int = 15) -> float:
    """Guo et al. 2017, eq. 3, bin by bin."""
    total = 0.0
    for m in range(1, num_bins + 1):
        members = (confidence_N > (m - 1) / num_bins) & (confidence_N <= m / num_bins)
        if members.any():
            total += members.sum() / len(confidence_N) * abs(right_N[members].mean() - confidence_N[members].mean())
    return 100 * total


def test_by_hand() -> None:
    # (0.8 right, 0.84 wrong) share a bin: |0.5 − 0.82| · 2/3; 0.55 right is alone: |1 − 0.55| · 1/3.
    found = calibration(of_confidence(0.81, 0.84, 0.55), torch.tensor([1, 0, 1]), "sigmoid")
    assert found.ece == pytest.approx(100 * (abs(0.5 - 0.825) * 2 / 3 + 0.45 / 3), abs=1e-4)
    assert (found.bin_counts[12], found.bin_accuracy[12]) == (2, 0.5)
    assert found.bin_confidence[12] == pytest.approx(0.825, abs=1e-6)
    assert (found.bin_counts[0], found.bin_accuracy[0], found.bin_confidence[0]) == (0, None, None)
    assert found.confidence == "sigmoid"


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_it_is_the_plain_loops(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NK = torch.randn(500, 7, generator=generator) * 3
    right_N = torch.rand(500, generator=generator) < 0.6
    probabilities_NK = (logits_NK.double().softmax(1) if kind == "softmax" else logits_NK.double().sigmoid()).numpy()
    assert calibration(logits_NK, right_N, kind).ece == pytest.approx(plain_ece(probabilities_NK.max(1), right_N.numpy()), abs=1e-5)


@given(order=st.permutations(range(40)), batches=st.integers(1, 40))
def test_order_and_batches_change_no_bit(order: list[int], batches: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_NK, right_N = torch.randn(40, 5, generator=generator), torch.rand(40, generator=generator) < 0.5
    parts = len(torch.zeros(40).chunk(batches))
    assert calibration(logits_NK[order], right_N[order], "softmax", parts) == calibration(logits_NK, right_N)


def test_a_perfectly_calibrated_predictor_has_no_error() -> None:
    found = calibration(of_confidence(*[0.75] * 8), torch.tensor([1, 1, 1, 0, 1, 1, 0, 1]), "sigmoid")
    assert found.ece == pytest.approx(0.0, abs=1e-5)


def test_no_image_gives_no_figure() -> None:
    assert ReliabilityBins(CPU, "softmax").result().ece is None


def test_extreme_and_broken_logits_stay_in_the_bins() -> None:
    logits_BK = torch.tensor([[1e4, -1e4], [-1e4, -2e4], [math.nan, 0.0], [0.0, 0.0]])
    for kind in ("softmax", "sigmoid"):
        found = calibration(logits_BK, torch.ones(4, dtype=torch.int64), kind)
        assert sum(found.bin_counts) == 4
        assert math.isfinite(found.ece or math.nan)
        if kind == "softmax":  # certain of two, half sure of one, and none of the broken one
            assert (found.bin_counts[14], found.bin_counts[7], found.bin_counts[0]) == (2, 1, 1)


def test_every_method_says_what_its_confidence_is() -> None:
    # All of them, so that a new method is not forgotten: is its classifier trained by K binary decisions, or by a softmax?
    sigmoid = dict.fromkeys(("bce3s", "bce", "tsl", "focal", "cb-focal"), "sigmoid")
    softmax = dict.fromkeys(("ce", "cb-ce", "balanced-softmax", "logit-adjusted", "ldam-drw", "glmc", "bcl"), "softmax")
    assert {name: confidence_kind(LossConfig(name=name)) for name in LOSSES} == sigmoid | softmax
    assert confidence_kind(LossConfig(name="tsl", joint="bce")) == "sigmoid"
    assert confidence_kind(LossConfig(name="tsl", joint="ce")) == "softmax"
    # A classifier that stage two trained anew is judged by what trained it last.
    of_stage_two = {method: confidence_kind(LossConfig(name="bce3s"), method) for method in RETRAIN_METHODS}
    assert of_stage_two == {"bce": "sigmoid", "crt": "softmax", "lws": "softmax", "tau-norm": "sigmoid"}
