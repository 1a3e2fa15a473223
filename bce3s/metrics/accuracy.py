"""Accuracy of a long-tailed recogniser: overall, balanced, and by shot group of the training counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bce3s.metrics.calibration import Calibration
from pipelines.config import require
from pipelines.datasets import shot_groups
from pipelines.types import IntArray


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 accuracies in percent; None where a group has no class or no image ("n/a", never 0).

    Args:
        all: share of images that are right (Liu et al. 2019, "overall").
        balanced: mean over classes of the per-class accuracy; equals `all` on a balanced test set.
        many, medium, few: mean per-class accuracy of classes with > 100, 20–100 and < 20 training images.
        per_class: [K].
        num_images: counted images.
        calibration: how far confidences are from accuracies, None where it was not measured.
    """

    all: float | None
    balanced: float | None
    many: float | None
    medium: float | None
    few: float | None
    per_class: tuple[float | None, ...]
    num_images: int
    calibration: Calibration | None = None

    @property
    def ece(self) -> float | None:
        """Expected calibration error in percent, None where it was not measured."""
        return None if self.calibration is None else self.calibration.ece

    def headline(self) -> dict[str, float | None]:
        """The five accuracies and the calibration error, without the lists."""
        return {name: getattr(self, name) for name in ("all", "many", "medium", "few", "balanced", "ece")}

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "ece": self.ece}


def accuracy_from_counts(
    correct_K: IntArray, total_K: IntArray, train_counts_K: IntArray, calibration: Calibration | None = None
) -> Accuracy:
    """Accuracies from int64 [K] counts of right and of all evaluated images; `train_counts_K` decides the shot groups."""
    seen_K = total_K > 0
    per_class_K = np.divide(correct_K * 100.0, total_K, out=np.zeros(len(total_K)), where=seen_K)

    def mean_over(classes_K: np.ndarray) -> float | None:
        chosen = classes_K & seen_K
        return float(per_class_K[chosen].mean()) if chosen.any() else None

    groups = {name: mean_over(members_K) for name, members_K in shot_groups(train_counts_K).items()}
    return Accuracy(
        all=float(correct_K.sum() * 100.0 / total_K.sum()) if total_K.sum() else None,
        balanced=mean_over(seen_K),
        many=groups["many"],
        medium=groups["medium"],
        few=groups["few"],
        per_class=tuple(float(value) if seen else None for value, seen in zip(per_class_K, seen_K, strict=True)),
        num_images=int(total_K.sum()),
        calibration=calibration,
    )


def accuracy_from_predictions(predicted_N: ArrayLike, labels_N: ArrayLike, train_counts_K: ArrayLike) -> Accuracy:
    """Accuracies of anybody's predictions.

    Args:
        predicted_N: class of each evaluated image, whole numbers [N]; lists, arrays, or tensors on the CPU.
        labels_N: the true ones, whole numbers [N].
        train_counts_K: training images of each class, whole numbers [K]; they decide the shot groups.

    Raises:
        ConfigError: predictions that are not one class an image, or labels that are no classes.
    """
    predicted, labels, counts_K = (np.asarray(values) for values in (predicted_N, labels_N, train_counts_K))
    one_each = predicted.shape == labels.shape and labels.ndim == 1 and all(values.dtype.kind in "iu" for values in (predicted, labels))
    shapes = f"predictions {list(predicted.shape)} and labels {list(labels.shape)}"
    require(one_each, f"{shapes} must be one whole number an image each: take the arg max of logits")
    num_classes = len(counts_K)
    known = len(labels) == 0 or (labels.min() >= 0 and labels.max() < num_classes)
    require(bool(known), f"labels must lie in 0…{num_classes - 1}, one class for each of the training counts")
    correct_K = np.bincount(labels[predicted == labels], minlength=num_classes)
    return accuracy_from_counts(correct_K, np.bincount(labels, minlength=num_classes), counts_K)


def format_percent(value: float | None) -> str:
    """'54.73', or 'n/a' for an empty group."""
    return "n/a" if value is None else f"{value:.2f}"
