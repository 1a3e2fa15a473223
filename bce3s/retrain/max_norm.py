"""Max-norm: rows of a classifier are kept within a ball (Alshammari et al. 2022, "Long-Tailed Recognition via Weight Balancing")."""

from __future__ import annotations

import torch
from torch import Tensor


class MaxNorm:
    """Shortens rows that are longer than a threshold set at the start: the reference's min + share·(max − min) of the row lengths.

    Logits of normalised or cosine rows do not depend on a row's length, so there the projection changes step sizes only: a gradient turns
    a shorter row further (traps.md A5). Biases are left alone, as in the reference, whose threshold for them is infinite.
    """

    def __init__(self, weight_KD: Tensor, share: float) -> None:
        """Measures the rows.

        Args:
            weight_KD: [K, D], where training starts.
            share: in (0, 1]; the reference's is 0.1.
        """
        lengths_K = weight_KD.detach().norm(dim=1)
        self.threshold = lengths_K.min() + share * (lengths_K.max() - lengths_K.min())

    @torch.no_grad()
    def project(self, weight_KD: Tensor) -> None:
        """Shortens the rows in place; those within the ball keep their bits."""
        lengths_K = weight_KD.norm(dim=1, keepdim=True)
        weight_KD.copy_(torch.where(lengths_K > self.threshold, weight_KD * (self.threshold / lengths_K), weight_KD))
