"""Calibration: whether a prediction's confidence is how often such predictions are right (Guo et al. 2017, section 2 and eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bce3s.config import LossConfig
from bce3s.distributed import World

NUM_BINS = 15
"""Equal-width bins of (0, 1], as Guo et al. and most who followed take."""
_SIGMOID_METHODS = ("bce3s", "bce", "focal", "cb-focal")
# Confidences are summed as whole numbers of 2^-32, so that no order of batches or ranks changes a bit; 2^31 images fit.
_UNIT = float(1 << 32)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A reliability diagram and its sum.

    Args:
        ece: Σ_m |B_m|/n · |accuracy of B_m − confidence of B_m| in percent (Guo et al. 2017, eq. 3); None without images.
        confidence: what it is of: "softmax", the largest softmax, or "sigmoid", the largest sigmoid.
        bin_counts: images of each bin m, whose confidences lie in ((m−1)/M, m/M].
        bin_accuracy, bin_confidence: their share that is right and mean confidence, in [0, 1]; None for an empty bin.
    """

    ece: float | None
    confidence: str
    bin_counts: tuple[int, ...]
    bin_accuracy: tuple[float | None, ...]
    bin_confidence: tuple[float | None, ...]


def confidence_kind(loss: LossConfig, retrained_with: str = "") -> str:
    """What a method's confidence is: "sigmoid" where its classifier is trained by K binary decisions, else "softmax".

    Guo et al. define confidence for a softmax alone. A method trained by BCE never normalises over classes, so a softmax of its logits
    is nothing it was trained to predict: what it says of its prediction is σ(z) of that class.

    Args:
        loss: of stage one.
        retrained_with: the method of stage two that trained the classifier anew; empty is none.
    """
    if retrained_with in ("bce", "crt", "lws"):
        return "sigmoid" if retrained_with == "bce" else "softmax"
    return "sigmoid" if loss.name in _SIGMOID_METHODS or (loss.name == "tsl" and loss.joint == "bce") else "softmax"


class ReliabilityBins:
    """Counts of a reliability diagram, on the device of the logits."""

    def __init__(self, device: torch.device, kind: str) -> None:
        """Empty bins for confidences of `kind`, "softmax" or "sigmoid"."""
        assert kind in ("softmax", "sigmoid")
        self._kind = kind
        self._totals_M3 = torch.zeros(NUM_BINS, 3, dtype=torch.int64, device=device)  # images, right ones, confidence

    def add(self, logits_BK: Tensor, right_B: Tensor) -> None:
        """One batch: float32 logits [B, K] and whether the largest is that of the label, bool or int64 [B]."""
        if self._kind == "sigmoid":
            confidence_B = logits_BK.amax(1).sigmoid()
        else:
            confidence_B = (logits_BK.amax(1) - logits_BK.logsumexp(1)).exp()
        confidence_B = confidence_B.double().nan_to_num(0.0).clamp(0.0, 1.0)
        bins_B = ((confidence_B * NUM_BINS).ceil().long() - 1).clamp_min(0)
        added_B3 = torch.stack([torch.ones_like(bins_B), right_B.long(), (confidence_B * _UNIT).round().long()], 1)
        self._totals_M3.index_add_(0, bins_B, added_B3)

    def sum_over(self, world: World) -> None:
        """Adds what the other ranks counted; all call it alike."""
        world.sum(self._totals_M3)

    def result(self) -> Calibration:
        """The diagram of what was added; waits for the device."""
        counts, rights, confidences = self._totals_M3.cpu().double().unbind(1)
        confidences = confidences / _UNIT
        num_images = float(counts.sum())

        def means(sums_M: Tensor) -> tuple[float | None, ...]:
            return tuple(total / count if count else None for total, count in zip(sums_M.tolist(), counts.tolist(), strict=True))

        figures: dict[str, Any] = {"bin_accuracy": means(rights), "bin_confidence": means(confidences)}
        return Calibration(
            ece=100.0 * float((rights - confidences).abs().sum()) / num_images if num_images else None,
            confidence=self._kind,
            bin_counts=tuple(int(count) for count in counts.tolist()),
            **figures,
        )
