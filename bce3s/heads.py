"""What stands behind the backbone: the normalised classifier, the projector, and the memory of one projection a class.

Source: BCE3S (Fan et al., AAAI 2026), joint and contrastive learning.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
"""Norms below this divide as this, so that a zero row stays zero."""


class NormalizedClassifier(nn.Linear):
    """Logits z_k = x·w_k + b_k with L2-normalised rows w_k; the features x keep their length.

    `weight` [K, D] and `bias` [K] are raw parameters that start as those of nn.Linear. The logits do not depend on a row's length,
    so weight decay acts on `weight` only as a schedule of its effective learning rate.
    """

    scale = 1.0

    def __init__(self, feature_dim: int, num_classes: int, bias: bool = True) -> None:
        super().__init__(feature_dim, num_classes, bias)

    def normalized_weight(self) -> Tensor:
        """Rows [K, D] of length 1, differentiable, in the dtype of `weight` also under autocast."""
        return F.normalize(self.weight, dim=1, eps=NORM_EPS)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Features [B, D] to logits [B, K]; under autocast they come in its dtype."""
        return F.linear(features_BD, self.normalized_weight(), self.bias)


class LinearClassifier(NormalizedClassifier):
    """Logits z_k = x·w_k + b_k with the rows as they are: what τ-normalisation and most of the field start from."""

    def forward(self, features_BD: Tensor) -> Tensor:
        """Features [B, D] to logits [B, K]; under autocast they come in its dtype."""
        return F.linear(features_BD, self.weight, self.bias)


class CosineClassifier(NormalizedClassifier):
    """Logits s·cos(x, w_k), without biases (LDAM, Cao et al. 2019: s = 30).

    Args:
        feature_dim: D.
        num_classes: K.
        scale: s.
    """

    def __init__(self, feature_dim: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__(feature_dim, num_classes, bias=False)
        self.scale = scale

    def forward(self, features_BD: Tensor) -> Tensor:
        """Features [B, D] to logits [B, K], float32 or float64, under autocast too: the scale multiplies what half precision loses."""
        wide_BD = features_BD if features_BD.dtype == torch.float64 else features_BD.float()
        with torch.autocast(features_BD.device.type, enabled=False):
            return F.linear(F.normalize(wide_BD, dim=1, eps=NORM_EPS), self.scale * self.normalized_weight())


def build_classifier(
    kind: str, feature_dim: int, num_classes: int, scale: float = 30.0, *, bias_prior: bool = False
) -> NormalizedClassifier:
    """One of `CLASSIFIERS`; with `bias_prior` its biases start at −log(K − 1), a prior of 1/K for each sigmoid (Lin et al. 2017, 3.3)."""
    if kind == "cosine":
        return CosineClassifier(feature_dim, num_classes, scale)
    classifier = LinearClassifier(feature_dim, num_classes) if kind == "linear" else NormalizedClassifier(feature_dim, num_classes)
    if bias_prior:
        nn.init.constant_(classifier.bias, -math.log(max(num_classes - 1, 1)))
    return classifier


class Projector(nn.Module):
    """Linear(D, D), ReLU, Linear(D, P); its output is not normalised."""

    def __init__(self, feature_dim: int, projection_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(feature_dim, feature_dim)
        self.output = nn.Linear(feature_dim, projection_dim)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Features [B, D] to projections [B, P]; under autocast they come in its dtype."""
        projections_BP: Tensor = self.output(F.relu(self.hidden(features_BD), inplace=True))
        return projections_BP


class FeatureMemory(nn.Module):
    """The last projection of each class, un-normalised and detached.

    `rows_KP` float32 [K, P] is zero, and `filled_K` bool [K] false, for a class that was not seen yet: a reader masks it out.
    Both are saved with the model, so a resumed run reads what the stopped one wrote.

    `update` writes in place, at addresses that stay. A graph that saved `filled_K` or `rows_KP` themselves must run its
    backward pass first (autograd raises otherwise); `normalized()` returns a copy that is safe either way.
    """

    rows_KP: Tensor
    filled_K: Tensor

    def __init__(self, num_classes: int, projection_dim: int) -> None:
        super().__init__()
        self.register_buffer("rows_KP", torch.zeros(num_classes, projection_dim))
        self.register_buffer("filled_K", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, projections_BP: Tensor, labels_B: Tensor) -> None:
        """Keeps, for each class of the batch, its last sample; other classes keep their row.

        Deterministic, without a wait of the host for the device, and traceable by torch.compile. Over several ranks, pass the
        gathered projections and labels in rank order on every rank: the memories then stay equal.

        Args:
            projections_BP: float of any precision [B, P], B >= 1, of source views only.
            labels_B: int64 [B], 0 <= label < K.
        """
        positions_B = torch.arange(labels_B.shape[0], device=labels_B.device)
        # A float scatter with repeated labels lets any writer win; the maximum of integer positions has only one answer.
        last_K = torch.full_like(self.filled_K, -1, dtype=torch.int64).scatter_reduce_(0, labels_B, positions_B, reduce="amax")
        present_K = last_K >= 0
        candidates_KP = projections_BP.index_select(0, last_K.clamp_min(0)).to(self.rows_KP.dtype)
        # An overflow in fp16 skips the optimizer's step; it must not stay in the memory either, to poison every later loss.
        present_K = present_K & candidates_KP.isfinite().all(1)
        self.rows_KP.copy_(torch.where(present_K[:, None], candidates_KP, self.rows_KP))
        self.filled_K.logical_or_(present_K)

    def normalized(self, eps: float = NORM_EPS) -> Tensor:
        """A copy of the rows [K, P] at length 1; a class that was not seen yet stays zero. Norms below `eps` divide as `eps`."""
        return F.normalize(self.rows_KP, dim=1, eps=eps)
