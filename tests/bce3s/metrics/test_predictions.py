"""Anybody's predictions, counted by class and by shot group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bce3s.metrics import accuracy_from_predictions
from pipelines.types import ConfigError

COUNTS = [500, 101, 100, 20, 19, 1]
LABELS = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # none of the last class
PREDICTED = [0, 0, 1, 0, 2, 5, 3, -1, 0, 0]  # −1 is an answer too, a wrong one


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_groups_follow_the_training_counts(kind: Any) -> None:
    found = accuracy_from_predictions(kind(PREDICTED), kind(LABELS), kind(COUNTS))
    assert (found.all, found.many, found.medium, found.few, found.num_images) == (50.0, 75.0, 50.0, 0.0, 10)
    assert found.per_class == (100.0, 50.0, 50.0, 50.0, 0.0, None)


def test_nothing_predicted_is_no_accuracy() -> None:
    found = accuracy_from_predictions(np.zeros(0, np.int64), np.zeros(0, np.int64), COUNTS)
    assert (found.all, found.many, found.num_images) == (None, None, 0)


@pytest.mark.parametrize(
    ("predicted", "labels", "sentence"),
    [
        (np.zeros((10, 6)), LABELS, r"^predictions \[10, 6\] and labels \[10\] must be one whole number an image each: take the arg max"),
        (np.zeros(10), LABELS, "one whole number an image each"),
        (PREDICTED[:9], LABELS, r"predictions \[9\] and labels \[10\]"),
        ([0], [6], r"^labels must lie in 0…5, one class for each of the training counts$"),
        ([0], [-1], "labels must lie in 0…5"),
    ],
)
def test_what_are_no_predictions_is_one_sentence(predicted: Any, labels: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        accuracy_from_predictions(predicted, labels, COUNTS)
