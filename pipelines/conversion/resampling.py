"""Fixed resampled streams of a split: the class balance that a reader without an order of its own (DALI, WebDataset, FFCV) sees.

A stream is E sample ids with exact class counts: "systematic" draws of `pipelines.order`, then a seeded shuffle. Where `bce3s` trains
itself it draws afresh every epoch; a stream on disk repeats the same draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.config import OrderConfig, require, require_choice
from pipelines.order import ClassTable, draw_samples
from pipelines.randomness import Purpose, derive_key
from pipelines.types import IntArray

# All of the partner stream's samplings but "progressive", which means nothing without epochs.
RESAMPLINGS: tuple[str, ...] = ("class-balanced", "square-root", "power", "effective-number", "instance")
_MAX_DRAWS = 1 << 30  # of a stream; its order is held in memory
_MAX_EXPONENT = 10.0  # far beyond use; keeps n^(1−p) and file names in bounds


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """One resampled stream to make.

    Args:
        sampling: how classes weigh, see `class_probabilities`.
        exponent: of "power": 0 as in the data, 1 class-balanced; nothing else reads it.
        beta: β of "effective-number"; nothing else reads it.
        epoch_size: E, draws in the stream; None is as many as the split has samples.
        seed: of draws and shuffle.
        materialised: copy the images in this order into tars of their own, for readers that cannot follow an order file.
    """

    sampling: str
    exponent: float = 1.0
    beta: float = 0.999
    epoch_size: int | None = None
    seed: int = 0
    materialised: bool = False

    def __post_init__(self) -> None:
        require_choice("resampling", self.sampling, RESAMPLINGS)
        require(
            0.0 <= self.exponent <= _MAX_EXPONENT, f"the exponent of a resampling must lie in [0, {_MAX_EXPONENT:g}], not {self.exponent}"
        )
        require(0.0 <= self.beta < 1.0, f"beta must lie in [0, 1), not {self.beta}")
        size = self.epoch_size
        require(size is None or 1 <= size <= _MAX_DRAWS, f"epoch_size must lie in 1…{_MAX_DRAWS:,}, not {size}")

    @property
    def name(self) -> str:
        """In file names: "class-balanced", "power-0.75", "effective-number-0.999"; seed and size are not part of it."""
        return "-".join([self.sampling, *(format(value, ".12g") for value in self.parameters().values())])

    def parameters(self) -> dict[str, float]:
        """The parameters that `sampling` reads, by name."""
        return {"power": {"exponent": self.exponent}, "effective-number": {"beta": self.beta}}.get(self.sampling, {})

    def describe(self, order_E: IntArray, labels_N: IntArray, num_classes: int) -> dict[str, Any]:
        """What a manifest says of the stream `order_E`, whichever files hold it; JSON values."""
        return {
            "name": self.name,
            "sampling": self.sampling,
            **self.parameters(),
            "seed": self.seed,
            "epoch_size": len(order_E),
            "class_counts": exact_counts(order_E, labels_N, num_classes).tolist(),
            "materialised": self.materialised,
        }


def resampled_order(labels_N: IntArray, num_classes: int, resampling: Resampling) -> IntArray:
    """Draws a stream; equal arguments give equal draws on any machine.

    Args:
        labels_N: int [N], 0 ≤ label < K.
        num_classes: K.
        resampling: what to draw.

    Returns:
        int64 [E] sample ids: class counts within one of E·q_k, the samples of a class used equally often to within one, shuffled.

    Raises:
        ConfigError: there is no sample to draw.
    """
    require(len(labels_N) > 0, f"cannot make the resampled stream '{resampling.name}': the split has no samples")
    config = OrderConfig(
        sampling=resampling.sampling,
        resample_exponent=resampling.exponent,
        effective_number_beta=resampling.beta,
        draw="systematic",
    )
    # A purpose of its own, so that the stream is not the partner epoch of a run with the same seed.
    key = derive_key(resampling.seed, Purpose.RESAMPLING)
    return draw_samples(ClassTable.of(labels_N, num_classes), config, key, resampling.epoch_size or len(labels_N))


def exact_counts(order_E: IntArray, labels_N: IntArray, num_classes: int) -> IntArray:
    """int64 [K]: how often each class occurs in `order_E`, ids into `labels_N`."""
    return np.bincount(labels_N[order_E], minlength=num_classes).astype(np.int64)
