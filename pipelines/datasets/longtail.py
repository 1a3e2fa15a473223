"""What makes a set long-tailed: class counts, shot groups, the exponential profile, and which images a subset keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipelines.config import require
from pipelines.types import DatasetError, IntArray


def class_counts(labels_N: IntArray, num_classes: int) -> IntArray:
    """Images of each class.

    Args:
        labels_N: int64 [N], 0 ≤ label < K.
        num_classes: K.

    Returns:
        int64 [K].

    Raises:
        DatasetError: a label lies outside 0…K-1.
    """
    if labels_N.size and not 0 <= labels_N.min() <= labels_N.max() < num_classes:
        raise DatasetError(f"labels run from {labels_N.min()} to {labels_N.max()}, but {num_classes} classes need 0 to {num_classes - 1}")
    return np.bincount(labels_N, minlength=num_classes).astype(np.int64)


def shot_groups(class_counts_K: IntArray) -> dict[str, NDArray[np.bool_]]:
    """Groups classes by *training* count: many > 100, medium 20 to 100, few < 20 (Liu et al. 2019, OLTR).

    Args:
        class_counts_K: int64 [K], of the train split.

    Returns:
        "many", "medium", "few" -> bool [K]; every class is in exactly one group, a group may be empty.
    """
    many_K, few_K = class_counts_K > 100, class_counts_K < 20
    return {"many": many_K, "medium": ~(many_K | few_K), "few": few_K}


def require_imbalance_factor(imbalance_factor: float) -> None:
    """Raises `ConfigError` unless the factor is finite and at least 1; the reference code's 0.01 is what we call 100."""
    inverse = f"; did you mean {1 / imbalance_factor:g}?" if 0 < imbalance_factor < 1 else ""
    sentence = f"imbalance_factor is largest/smallest class and must be >= 1, not {imbalance_factor:g}{inverse}"
    require(math.isfinite(imbalance_factor) and imbalance_factor >= 1, sentence)


def exponential_counts(max_count: int, num_classes: int, imbalance_factor: float) -> IntArray:
    """The field's profile n_k = int(max_count · IF^(-k/(K-1))), at least 1 (Cui et al. 2019).

    Args:
        max_count: images of class 0, at least 1.
        num_classes: K, at least 1.
        imbalance_factor: IF = largest/smallest class, at least 1.

    Returns:
        int64 [K], not rising.

    Raises:
        ConfigError: IF below 1.
    """
    require_imbalance_factor(imbalance_factor)
    last = max(num_classes - 1, 1)
    return np.array([max(1, int(max_count * imbalance_factor ** (-k / last))) for k in range(num_classes)], np.int64)


def rows_by_class(labels_N: IntArray, num_classes: int) -> list[IntArray]:
    """Positions of each class in rising order: K arrays, int64 [n_k]."""
    rows_N = np.argsort(labels_N, kind="stable").astype(np.int64)
    return np.split(rows_N, np.cumsum(class_counts(labels_N, num_classes))[:-1])


def select_subset(labels_N: IntArray, counts_K: IntArray, *, subset: str, seed: int) -> IntArray:
    """Keeps `counts_K[k]` images of each class k.

    Args:
        labels_N: int64 [N], 0 ≤ label < K.
        counts_K: int64 [K], none above what the class has.
        subset: "first" keeps the first images of a class in the order given, "seeded" a draw without replacement.
        seed: of the draw; "first" does not read it.

    Returns:
        int64 positions, rising.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    kept = []
    for rows, count in zip(rows_by_class(labels_N, len(counts_K)), counts_K, strict=True):
        kept.append(rows[:count] if subset == "first" else rng.choice(rows, count, replace=False))
    return np.sort(np.concatenate(kept))


def stratified_split(labels_N: IntArray, num_classes: int, fractions: Mapping[str, float], seed: int) -> dict[str, IntArray]:
    """Splits images at random so that every class gives its share to every part.

    A class gives at least one image to each part whose fraction is not 0, in the order of `fractions`, as long as one stays for training:
    a rare class without test images could not be measured.

    Args:
        labels_N: int64 [N], 0 ≤ label < K.
        num_classes: K.
        fractions: part -> share of each class, summing to less than 1.
        seed: of the draw.

    Returns:
        "train" and every part of `fractions` -> int64 positions, rising; together they hold every position once.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    parts: dict[str, list[IntArray]] = {part: [] for part in ("train", *fractions)}
    for rows in rows_by_class(labels_N, num_classes):
        left = rng.permutation(rows)
        for part, fraction in fractions.items():
            count = max(1, round(fraction * len(rows))) if fraction > 0 else 0
            count = max(0, min(count, len(left) - 1))
            parts[part].append(left[:count])
            left = left[count:]
        parts["train"].append(left)
    return {part: np.sort(np.concatenate(rows)) for part, rows in parts.items()}
