"""Figures of an evaluated split, streamed on its device: accuracy, calibration, and the geometry of features and classifier."""

from __future__ import annotations

from bce3s.metrics.accuracy import Accuracy, accuracy_from_counts, accuracy_from_predictions, format_percent
from bce3s.metrics.calibration import Calibration, ReliabilityBins, confidence_kind
from bce3s.metrics.collapse import Collapse, neural_collapse
from bce3s.metrics.cosines import PairwiseCosines, pairwise_cosines
from bce3s.metrics.features import FeatureGeometry, FeatureStatistics

__all__ = [
    "Accuracy",
    "Calibration",
    "Collapse",
    "FeatureGeometry",
    "FeatureStatistics",
    "PairwiseCosines",
    "ReliabilityBins",
    "accuracy_from_counts",
    "accuracy_from_predictions",
    "confidence_kind",
    "format_percent",
    "neural_collapse",
    "pairwise_cosines",
]
