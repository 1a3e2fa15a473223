"""Which classes a step draws: functions of the step's key and the class alone, so the same on every device and rank."""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps what the uniform term draws apart from what the joint term draws under the same key.
_UNIFORM_SALT = 0x2545F4914F6CDD1D


def class_draws(draw_key: Tensor, num_classes: int) -> Tensor:
    """int64 [K] ≥ 0, random: two rounds of a multiply-xorshift mixer of (key, class) (after Steele et al. 2014, SplitMix)."""
    values_K = (torch.arange(1, num_classes + 1, device=draw_key.device) * -7046029254386353131) + draw_key
    for _ in range(2):
        values_K = (values_K ^ ((values_K >> 31) & 0x1FFFFFFFF)) * -4658895280553007687
    # The last product leaves the low bits weak; order is decided by the high ones.
    return (values_K >> 1) & 0x3FFFFFFFFFFFFFFF


def draw_class_subset(labels_G: Tensor, num_classes: int, negative_ratio: float, draw_key: Tensor) -> Tensor:
    """Bool [K]: every class present in the batch, filled up at random to negative_ratio·K (traps.md A1: present classes are never dropped).

    Shapes do not depend on the labels and nothing is read back: all classes are ranked, the present ones first.
    """
    present_K = torch.zeros(num_classes, dtype=torch.bool, device=labels_G.device).index_fill_(0, labels_G, True)
    if negative_ratio >= 1.0:
        return torch.ones_like(present_K)
    order_K = torch.where(present_K, -1, class_draws(draw_key, num_classes)).argsort(stable=True)
    chosen_K = torch.zeros_like(present_K).index_fill_(0, order_K[: int(num_classes * negative_ratio)], True)
    return chosen_K | present_K


def draw_classes(draw_key: Tensor, num_classes: int, num_drawn: int) -> Tensor:
    """int64 [R] of R = `num_drawn` distinct classes, each set of R equally likely; independent of `draw_class_subset` under one key."""
    return class_draws(draw_key ^ _UNIFORM_SALT, num_classes).argsort(stable=True)[:num_drawn]
