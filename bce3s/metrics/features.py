"""Geometry of the features a classifier stands on: how compact each class is, how far apart the classes are, how collapsed both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bce3s.distributed import World
from bce3s.metrics.collapse import Collapse, neural_collapse
from bce3s.metrics.cosines import PairwiseCosines, pairwise_cosines
from pipelines.datasets import shot_groups
from pipelines.types import IntArray


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and population standard deviation over the `num_classes` classes that have the figure; None where none has."""

    mean: float | None
    std: float | None
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class FeatureGeometry:
    """What `FeatureStatistics` found on one split. Cosines are plain numbers, not percent.

    The BCE3S paper reports a compactness of 95.47 % (std over classes 1.81) without a formula that settles what is averaged; the mean
    over pairs below is our reading, so that figures of one table compare with each other before they compare with the paper's.

    Args:
        num_images, num_classes: counted; classes without an image are left out of everything.
        compactness: "all", "many", "medium", "few" → over their classes, of the mean cosine of all pairs of features of one class.
        compactness_K: of each class; None below two images.
        separability: the same groups → over their classes, of 1 − the mean cosine of the class's mean feature with the others'.
        nearest: the same groups → over their classes, of the cosine with the nearest other class mean.
        nearest_K: of each class; None without images.
        class_means: all pairs of class means (not centred: after a ReLU all are positive); None below two classes.
        classifier: all pairs of classifier rows; None below two.
        collapse: neural collapse.
    """

    num_images: int
    num_classes: int
    compactness: dict[str, Spread]
    compactness_K: tuple[float | None, ...]
    separability: dict[str, Spread]
    nearest: dict[str, Spread]
    nearest_K: tuple[float | None, ...]
    class_means: PairwiseCosines | None
    classifier: PairwiseCosines | None
    collapse: Collapse

    def figures(self) -> dict[str, Any]:
        """Without the lists of all classes, ready for JSON."""
        figures = {name: value for name, value in asdict(self).items() if not name.endswith("_K")}
        for name in ("class_means", "classifier"):
            cosines = getattr(self, name)
            figures[name] = None if cosines is None else cosines.figures()
        return figures

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**self.figures(), "compactness_K": self.compactness_K, "nearest_K": self.nearest_K}


class FeatureStatistics:
    """Sums over the features of a split, on their device; their size depends on K and D alone, and ranks add theirs up.

    Everything is float64: a sum over a class less the squares of its parts cancels all but the spread of its features, which may be a
    thousandth of their mean; its square is then 10⁻⁶ of what is summed, and float32 keeps 10⁻⁷.
    """

    def __init__(self, num_classes: int, feature_dim: int, device: torch.device) -> None:
        """Empty; takes 16·K·D + 8·D² bytes (300 MB at K = 8,142 and D = 2,048)."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._counts_K = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._sums_KD, self._directions_KD = zeros(num_classes, feature_dim), zeros(num_classes, feature_dim)
        self._lengths_K, self._products_DD = zeros(num_classes), zeros(feature_dim, feature_dim)

    def add(self, features_BD: Tensor, labels_B: Tensor) -> None:
        """One batch: float features [B, D] as the classifier gets them, and int64 labels [B]."""
        features_BD = features_BD.double()
        directions_BD = F.normalize(features_BD, dim=1, eps=1e-300)  # a zero feature has no direction, and stays zero
        self._counts_K.scatter_add_(0, labels_B, torch.ones_like(labels_B))
        self._sums_KD.index_add_(0, labels_B, features_BD)
        self._directions_KD.index_add_(0, labels_B, directions_BD)
        self._lengths_K.index_add_(0, labels_B, directions_BD.square().sum(1))
        self._products_DD.addmm_(features_BD.T, features_BD)

    def sum_over(self, world: World) -> None:
        """Adds what the other ranks collected; all call it alike."""
        for sums in (self._counts_K, self._sums_KD, self._directions_KD, self._lengths_K, self._products_DD):
            world.sum(sums)

    def geometry(self, rows_KD: Tensor, train_counts_K: IntArray) -> FeatureGeometry:
        """The figures of what was added; waits for the device.

        Args:
            rows_KD: float [K, D], the classifier's rows as they meet the features: normalised where the classifier normalises them.
            train_counts_K: int64 [K], for the shot groups.
        """
        counts_K = self._counts_K.double()
        pairs_K = counts_K * (counts_K - 1)
        # ‖Σu‖² holds each pair twice and each feature with itself.
        compactness_K = (self._directions_KD.square().sum(1) - self._lengths_K) / pairs_K
        seen_K = self._counts_K > 0
        means_KD = self._sums_KD[seen_K] / counts_K[seen_K, None]
        class_means = pairwise_cosines(means_KD)
        classifier = pairwise_cosines(rows_KD)
        seen_cosines = classifier if bool(seen_K.all()) else pairwise_cosines(rows_KD[seen_K])
        nearest_K, mean_K = (np.full(len(counts_K), np.nan) for _ in range(2))
        if class_means is not None:
            nearest_K[seen_K.cpu().numpy()], mean_K[seen_K.cpu().numpy()] = class_means.nearest_K, class_means.mean_K
        groups = {"all": np.ones(len(counts_K), bool), **shot_groups(train_counts_K)}

        def over_groups(values_K: np.ndarray) -> dict[str, Spread]:
            return {name: _spread(values_K[members_K]) for name, members_K in groups.items()}

        compact_K = compactness_K.cpu().numpy()
        return FeatureGeometry(
            num_images=int(self._counts_K.sum()),
            num_classes=int(seen_K.sum()),
            compactness=over_groups(compact_K),
            compactness_K=_known(compact_K),
            separability=over_groups(1.0 - mean_K),
            nearest=over_groups(nearest_K),
            nearest_K=_known(nearest_K),
            class_means=class_means,
            classifier=classifier,
            collapse=neural_collapse(means_KD, self._within(means_KD, seen_K), rows_KD[seen_K], seen_cosines),
        )

    def _within(self, means_KD: Tensor, seen_K: Tensor) -> Tensor | None:
        """Σ_W: the scatter around the class means, in which a class of one image has none, over the images of the other classes."""
        counts_K = self._counts_K[seen_K].double()
        num_images = float(counts_K[counts_K >= 2].sum())
        scatter_DD = self._products_DD - (means_KD * counts_K[:, None]).T @ means_KD
        return scatter_DD / num_images if num_images else None


def _spread(values: np.ndarray) -> Spread:
    known = values[np.isfinite(values)]
    if not len(known):
        return Spread(mean=None, std=None, num_classes=0)
    return Spread(mean=float(known.mean()), std=float(known.std()), num_classes=len(known))


def _known(values_K: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in values_K)
