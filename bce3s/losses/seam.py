"""What every loss is given and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixedTargets:
    """The soft target t = λ·onehot(labels) + (1−λ)·onehot(partner_labels) without its [B, K] matrix.

    Args:
        labels_B, partner_labels_B: int64 [B].
        lam: float32 [] on the device, in [0, 1].
    """

    labels_B: Tensor
    partner_labels_B: Tensor
    lam: Tensor


class LossOutput(NamedTuple):
    """`total`, float32 [], is what is differentiated; `terms` are detached float32 [] for the log, before their weights."""

    total: Tensor
    terms: dict[str, Tensor]


class Classifier(Protocol):
    """Features to logits."""

    def __call__(self, features_BD: Tensor) -> Tensor:
        """Logits [B, K]."""
        ...

    def normalized_weight(self) -> Tensor:
        """L2-normalised rows [K, D]."""
        ...


class Projector(Protocol):
    """Features to the space of the contrastive term."""

    def __call__(self, features_BD: Tensor) -> Tensor:
        """Projections [B, P]."""
        ...


class FeatureMemory(Protocol):
    """One projection a class."""

    filled_K: Tensor

    def normalized(self) -> Tensor:
        """L2-normalised rows [K, P], float32; zeros where a class is not filled."""
        ...

    def update(self, projections_BP: Tensor, labels_B: Tensor) -> None:
        """Stores the last projection of each class of the batch."""
        ...


class Heads(Protocol):
    """What a loss may use of the model beside the features."""

    @property
    def classifier(self) -> Classifier:
        """Normalised classifier."""
        ...

    @property
    def projector(self) -> Projector:
        """Projector of the contrastive term."""
        ...

    @property
    def feature_memory(self) -> FeatureMemory:
        """Feature memory of the contrastive term."""
        ...


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What one step hands to its loss.

    Args:
        features_VD: [3B, D], the views source, mixup and cutmix one after the other.
        mixup: target of the mixup view; its `labels_B` are the labels of the source view.
        cutmix: target of the cutmix view.
        heads: of the model.
        epoch: from 0.
        generator: on the features' device, for losses that sample; None is torch's global one.
    """

    features_VD: Tensor
    mixup: MixedTargets
    cutmix: MixedTargets
    heads: Heads
    epoch: int
    generator: torch.Generator | None = None


class Loss(Protocol):
    """One method."""

    def floors(self, num_classes: int) -> dict[str, float]:
        """The least value each term can reach at K classes, where it is known and not 0; sums over classes have large ones."""
        ...

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """The loss of one step."""
        ...
