"""The geometry of features beside the accuracies at a run's end, where the device has room for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from bce3s.distributed import ALONE, World
from bce3s.evaluate import classifier_rows
from bce3s.metrics import Accuracy, FeatureGeometry, FeatureStatistics
from bce3s.models import Recogniser
from pipelines.types import IntArray

Measure = Callable[[FeatureStatistics | None], dict[str, Accuracy]]


def measure_with_geometry(
    measure: Measure, model: Recogniser, train_counts_K: IntArray, device: torch.device, say: Callable[[str], None], world: World = ALONE
) -> tuple[dict[str, Accuracy], FeatureGeometry | None]:
    """What `measure` finds, and the geometry of the features and the classifier; None where the device has no room for that.

    Its sums and matrices are float64 (`FeatureStatistics`), and a device that training has filled may not hold them: a run is not lost
    over them.

    Args:
        measure: evaluates `model`, and adds its features to what it is given.
        model: of the features and the classifier.
        train_counts_K: int64 [K], for the shot groups.
        device: of `model`.
        say: told in one sentence that the geometry is left out.
        world: the ranks that measure together.

    Raises:
        torch.OutOfMemoryError: there is no room for the evaluation itself.
    """
    statistics: FeatureStatistics | None = None
    found: dict[str, Accuracy] | None = None
    with suppress(torch.OutOfMemoryError):
        statistics = FeatureStatistics(len(train_counts_K), model.backbone.feature_dim, device)
    if _any_lacks(statistics, device, world):
        statistics = None  # the ranks' sums are added up: all have them, or none
    if statistics is not None:
        try:
            found = measure(statistics)
            return found, statistics.geometry(classifier_rows(model.classifier), train_counts_K)
        except torch.OutOfMemoryError:
            if found is None and world.size > 1:
                raise  # the others are in the middle of their evaluation
            statistics = None
    say(
        f"the geometry of the features is not reported: {device} has no room for it beside the training; "
        "'bce3s evaluate RUN --features' measures it"
    )
    return found or measure(None), None


def _any_lacks(statistics: FeatureStatistics | None, device: torch.device, world: World) -> bool:
    """Whether some rank has none; all call it alike."""
    if world.size == 1:
        return statistics is None
    return bool(world.sum(torch.tensor(int(statistics is None), device=device)).item())
