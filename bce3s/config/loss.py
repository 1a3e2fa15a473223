"""The method that a run trains with, and its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.config import require, require_choice

TERM_KINDS = ("bce", "ce", "off")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss (method.md; symbols of the papers in brackets). Each method reads its own settings only.

    Args:
        name: a name of `bce3s.losses.LOSSES`.
        joint, contrastive, uniform: of "tsl": each term as "bce", "ce" or "off" (the paper's ablation; joint cannot be off).
        contrastive_weight: of the sample-to-sample term [λ_ss].
        uniform_weight: of the classifier-to-classifier term [λ_cc].
        temperature: of the contrastive term's cosines [τ].
        negative_ratio: share of the K classes that the source view's joint BCE sees [r]; 1 is all of them.
        logit_clamp: logits are clamped to ± this before softplus.
        contrastive_warmup_epochs: epochs that only fill the feature memory.
        uniform_samples: classes drawn each step for an unbiased estimate of the uniform term; 0 takes all, exactly.
        sigmoid_adjustment: of the BCE joint term: τ·log(K·π_k) is added to the logit of class k of prior π_k in training only; 0 is off.
        focal_gamma: of "focal" and "cb-focal" [γ].
        effective_number_beta: of "cb-ce", "cb-focal" and LDAM's deferred reweighting [β].
        logit_adjustment: of "logit-adjusted" [τ].
        max_margin: of "ldam-drw", the margin of the smallest class [max Δ].
        drw_start: share of the epochs after which "ldam-drw" reweights.
        glmc_label_exponent: of "glmc": classes weigh n_k^(−this) in its reweighted term.
        glmc_consistency_weight: of "glmc"'s consistency of the two mixed views [γ].
        bcl_contrastive_weight, bcl_temperature: of "bcl"'s balanced contrastive term [μ, τ], as its authors' script has them.
    """

    name: str = "bce3s"
    joint: str = "bce"
    contrastive: str = "bce"
    uniform: str = "bce"
    contrastive_weight: float = 0.1
    uniform_weight: float = 1.0
    temperature: float = 1.0
    negative_ratio: float = 0.4
    logit_clamp: float = 64.0
    contrastive_warmup_epochs: int = 1
    uniform_samples: int = 0
    sigmoid_adjustment: float = 0.0
    focal_gamma: float = 2.0
    effective_number_beta: float = 0.9999
    logit_adjustment: float = 1.0
    max_margin: float = 0.5
    drw_start: float = 0.8
    glmc_label_exponent: float = 1.2
    glmc_consistency_weight: float = 4.0
    bcl_contrastive_weight: float = 0.35
    bcl_temperature: float = 0.07

    @property
    def title(self) -> str:
        """The method, of "tsl" with its terms: tsl-bce-ce-off."""
        return f"tsl-{self.joint}-{self.contrastive}-{self.uniform}" if self.name == "tsl" else self.name

    def __post_init__(self) -> None:
        for name in ("joint", "contrastive", "uniform"):
            require_choice(f"loss.{name}", getattr(self, name), TERM_KINDS)
        require(self.joint != "off", "loss.joint cannot be off: without it no classifier is trained")
        for name in _NOT_NEGATIVE:
            require(0 <= getattr(self, name) < math.inf, f"{name} cannot be negative or infinite, not {getattr(self, name)}")
        for name in ("temperature", "bcl_temperature"):
            require(0 < getattr(self, name) < math.inf, f"{name} must be positive, not {getattr(self, name)}")
        require(self.contrastive_warmup_epochs >= 0, f"contrastive_warmup_epochs cannot be negative, not {self.contrastive_warmup_epochs}")
        require(0 < self.negative_ratio <= 1, f"negative_ratio must lie in (0, 1], not {self.negative_ratio}")
        require(self.logit_clamp > 0, f"logit_clamp must be positive, not {self.logit_clamp}")
        require(0 <= self.effective_number_beta < 1, f"effective_number_beta must lie in [0, 1), not {self.effective_number_beta}")
        require(0 <= self.drw_start <= 1, f"drw_start is a share of the epochs and must lie in [0, 1], not {self.drw_start}")
        require(
            self.uniform_samples == 0 or self.uniform_samples >= 2, f"uniform_samples must be 0 or at least 2, not {self.uniform_samples}"
        )


_NOT_NEGATIVE = (
    *("contrastive_weight", "uniform_weight", "sigmoid_adjustment", "focal_gamma", "logit_adjustment", "max_margin"),
    *("glmc_label_exponent", "glmc_consistency_weight", "bcl_contrastive_weight"),
)
