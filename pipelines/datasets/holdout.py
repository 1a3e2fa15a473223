"""Val and test taken from train where a source of one's own has none, and the long tail that train keeps when asked."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipelines.config import require
from pipelines.datasets import DatasetOptions
from pipelines.datasets.longtail import class_counts, exponential_counts, select_subset, stratified_split
from pipelines.types import IntArray, JsonValue


def divide_train(
    labels_N: IntArray, num_classes: int, there: Mapping[str, str], options: DatasetOptions
) -> tuple[dict[str, IntArray], dict[str, JsonValue]]:
    """Divides the images of train over the splits that are missing.

    Args:
        labels_N: int64 [N], 0 ≤ label < K, of everything found for train.
        num_classes: K.
        there: "val" and "test", where the source has them -> what to call them in messages.
        options: `val_fraction` and `test_fraction` (0.1 each) of what is missing, stratified; `imbalance_factor` for what train keeps
            afterwards, `subset` ("seeded") and `seed` (0) for which images these are.

    Returns:
        "train" and each missing split -> int64 positions, rising; and the options as they were used.

    Raises:
        ConfigError: fractions that leave no training images, one for a split that is there, or a subset of nothing.
    """
    require(options.subset is None or options.imbalance_factor is not None, "subset picks what imbalance_factor keeps: give that as well")
    seed, subset = options.seed or 0, options.subset or "seeded"
    fractions = _fractions(options, there)
    rows = stratified_split(labels_N, num_classes, fractions, seed)
    if options.imbalance_factor is not None:
        counts_K = _profile(labels_N[rows["train"]], num_classes, options.imbalance_factor)
        rows["train"] = rows["train"][select_subset(labels_N[rows["train"]], counts_K, subset=subset, seed=seed)]
    resolved = {"imbalance_factor": options.imbalance_factor, "subset": subset, "seed": seed}
    return rows, resolved | {f"{split}_fraction": fraction for split, fraction in fractions.items()}


def _fractions(options: DatasetOptions, there: Mapping[str, str]) -> dict[str, float]:
    """What each missing split takes from train; test comes first, so that a class of two images is at least measured."""
    fractions = {}
    for split, fraction in (("test", options.test_fraction), ("val", options.val_fraction)):
        if split not in there:
            fractions[split] = 0.1 if fraction is None else fraction
        else:
            require(fraction is None, f"{split}_fraction splits images off train, but {there[split]} is there: leave the option out")
    total = sum(fractions.values())
    require(total < 1, f"val and test would take {total:g} of each class: their fractions must sum to less than 1")
    return fractions


def _profile(labels_N: IntArray, num_classes: int, imbalance_factor: float) -> IntArray:
    available_K = class_counts(labels_N, num_classes)
    counts_K = np.empty_like(available_K)
    # Stable, so that classes of one size are ordered by name.
    counts_K[np.argsort(-available_K, kind="stable")] = exponential_counts(int(available_K.max()), num_classes, imbalance_factor)
    return np.minimum(counts_K, available_K)
