"""Accuracies by shot group, with their edges."""

from __future__ import annotations

import numpy as np

from bce3s.metrics import accuracy_from_counts, format_percent


def test_groups_follow_the_training_counts() -> None:
    train_counts = np.array([500, 101, 100, 20, 19, 1])
    correct, total = np.array([9, 8, 6, 4, 2, 1]), np.full(6, 10)
    found = accuracy_from_counts(correct, total, train_counts)
    assert (found.many, found.medium, found.few) == (85.0, 50.0, 15.0)
    assert found.all == 50.0
    assert found.balanced == 50.0
    assert found.per_class == (90.0, 80.0, 60.0, 40.0, 20.0, 10.0)
    assert found.num_images == 60


def test_all_weighs_images_and_balanced_weighs_classes() -> None:
    found = accuracy_from_counts(np.array([90, 0]), np.array([90, 10]), np.array([500, 5]))
    assert found.all == 90.0
    assert found.balanced == 50.0


def test_an_empty_group_is_not_zero() -> None:
    found = accuracy_from_counts(np.array([5, 0]), np.array([10, 0]), np.array([500, 5]))
    assert found.few is None
    assert found.medium is None
    assert found.per_class == (50.0, None)
    assert format_percent(found.few) == "n/a"


def test_no_image_at_all_gives_no_figure() -> None:
    found = accuracy_from_counts(np.zeros(2, np.int64), np.zeros(2, np.int64), np.array([5, 5]))
    assert found.all is None
    assert found.balanced is None
