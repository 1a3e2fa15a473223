"""How a run follows its gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.config import require, require_choice

OPTIMIZERS = ("sgd", "adamw", "lars")
SCHEDULES = ("step", "epoch")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, with linear warm-up and a cosine to zero.

    Args:
        name: "sgd", "adamw" or "lars" (You et al. 2017).
        learning_rate: peak, for the recipe's batch size.
        momentum: of SGD and LARS; AdamW's first beta.
        beta2: AdamW's second beta.
        warmup_epochs: epochs of linear rise; fractions are allowed.
        schedule: the rate changes every "step" or, as the reference does, every "epoch".
        weight_decay: on every parameter, as the reference has it, unless `decay_norm_and_bias` is off.
        clip_norm: global gradient norm limit in every precision; 0 is off.
    """

    name: str = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    beta2: float = 0.999
    nesterov: bool = False
    weight_decay: float = 5e-3
    decay_norm_and_bias: bool = True
    warmup_epochs: float = 0.0
    schedule: str = "step"
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        require_choice("optimizer", self.name, OPTIMIZERS)
        require_choice("schedule", self.schedule, SCHEDULES)
        require(0 < self.learning_rate < math.inf, f"learning_rate must be positive and finite, not {self.learning_rate}")
        require(0 <= self.weight_decay < math.inf, f"weight_decay cannot be negative or infinite, not {self.weight_decay}")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), not {self.momentum}")
        require(0 <= self.beta2 < 1, f"beta2 must lie in [0, 1), not {self.beta2}")
        require(self.momentum > 0 or not self.nesterov, "nesterov needs a momentum above 0")
        require(self.name == "sgd" or not self.nesterov, f"nesterov is SGD's, not of {self.name}")
        require(self.warmup_epochs >= 0, f"warmup_epochs cannot be negative, not {self.warmup_epochs}")
        require(self.clip_norm >= 0, f"clip_norm cannot be negative, not {self.clip_norm}")
