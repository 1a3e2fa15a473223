"""Stage two: the classifier trained anew on frozen features."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pipelines.config import require, require_choice

RETRAIN_METHODS = ("bce", "crt", "lws", "tau-norm")
BATCH_NORMS = ("frozen", "updated")
OWN_RATE, OWN_DECAY = 0.0, -1.0  # ask for the method's own


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Stage two (method.md, "Stage two"; Kang et al. 2020, section 4).

    Args:
        method: "bce" is the paper's class-balanced BCE from where stage one ended; "crt" trains a fresh classifier under class-balanced
            sampling; "lws" learns one scale a class; "tau-norm" divides rows by their norm to the power `tau`, without training.
        epochs: over the training images.
        batch_size: images a step.
        learning_rate: peak; a half cosine to 0. 0 is the method's own, in proportion to the batch: 1e-4 for 64 images a step of "bce"
            (method.md, "Stage two"), 0.2 for 512 of "crt" and "lws" (cls_crt.yaml and cls_lws.yaml of Kang et al.'s repository).
        momentum: of SGD.
        weight_decay: of SGD. −1 is the method's own: 0 of "bce", 5e-4 of "crt" and "lws" (the same files).
        effective_number_beta: of "bce": a sample of class k weighs (1−β)/(1−β^n_k), scaled to mean 1 over classes (Cui et al. 2019).
        negative_ratio: of "bce": share of the K classes in a step, those of the batch always among them.
        tau: of "tau-norm".
        batch_norm: "frozen" computes features once and keeps them on the device; "updated" is the reference's: batch statistics, running
            statistics that drift, and every epoch through the backbone (traps.md A4).
        augmented_epochs: epochs' worth of differently augmented features that are kept where batch-norm is frozen, used in turn.
        max_norm: rows longer than the smallest plus this share of the range of row lengths at the start are shortened to it after every
            epoch (the reference's 0.1; traps.md A5: changes step sizes only where rows are normalised); 0 is off.
    """

    method: str = "bce"
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = OWN_RATE
    momentum: float = 0.9
    weight_decay: float = OWN_DECAY
    effective_number_beta: float = 0.99999
    negative_ratio: float = 0.4
    tau: float = 1.0
    batch_norm: str = "frozen"
    augmented_epochs: int = 2
    max_norm: float = 0.0

    def __post_init__(self) -> None:
        require_choice("method", self.method, RETRAIN_METHODS)
        require_choice("batch_norm", self.batch_norm, BATCH_NORMS)
        for name in ("epochs", "batch_size", "augmented_epochs"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), not {self.momentum}")
        for name in ("learning_rate", "tau"):
            require(0 <= getattr(self, name) < math.inf, f"{name} cannot be negative or infinite, not {getattr(self, name)}")
        decays = 0 <= self.weight_decay < math.inf or self.weight_decay == OWN_DECAY
        require(decays, f"weight_decay is 0 or more, or -1 for the method's own, not {self.weight_decay}")
        require(0 <= self.effective_number_beta < 1, f"effective_number_beta must lie in [0, 1), not {self.effective_number_beta}")
        require(0 < self.negative_ratio <= 1, f"negative_ratio must lie in (0, 1], not {self.negative_ratio}")
        require(0 <= self.max_norm <= 1, f"max_norm must lie in [0, 1], not {self.max_norm}")
        trains_rows = self.method in ("bce", "crt")
        require(trains_rows or not self.max_norm, f"max_norm shortens rows that are trained, and {self.method} trains none: leave it 0")

    def resolved(self) -> RetrainConfig:
        """The same with the values that are used, where 0 (`learning_rate`) and −1 (`weight_decay`) ask for the method's own."""
        is_bce = self.method == "bce"
        rate = self.learning_rate or (1e-4 * self.batch_size / 64 if is_bce else 0.2 * self.batch_size / 512)
        decay = self.weight_decay if self.weight_decay != OWN_DECAY else 0.0 if is_bce else 5e-4
        return replace(self, learning_rate=rate, weight_decay=decay)

    def for_method(self, method: str) -> RetrainConfig:
        """The same for `method`: another one does not take over what this one's rate and weight decay are."""
        if method == self.method:
            return self
        return replace(self, method=method, learning_rate=OWN_RATE, weight_decay=OWN_DECAY)
