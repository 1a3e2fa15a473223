"""The figures of a report, in the order of the page."""

from __future__ import annotations

from collections.abc import Sequence

from bce3s.report.figures.accuracy_by_count import accuracy_by_count
from bce3s.report.figures.accuracy_by_group import accuracy_by_group
from bce3s.report.figures.class_counts import class_counts
from bce3s.report.figures.classifier_cosines import classifier_cosines
from bce3s.report.figures.cosine_histogram import cosine_histogram
from bce3s.report.figures.features import features
from bce3s.report.figures.figure import FORMATS, MOST_SVG_MARKS, Figure, Missing, Panel
from bce3s.report.figures.reliability import reliability
from bce3s.report.figures.style import THEMES, Theme, vega_config
from bce3s.report.figures.throughput import throughput
from bce3s.report.figures.training_accuracy import training_accuracy
from bce3s.report.figures.training_losses import training_losses
from bce3s.report.findings import RunFindings

__all__ = ["FIGURE_NAMES", "FORMATS", "MOST_SVG_MARKS", "THEMES", "Figure", "Missing", "Panel", "Theme", "draw_figures", "vega_config"]

_DRAWN_BY = {
    "accuracy-by-group": accuracy_by_group,
    "class-counts": class_counts,
    "accuracy-by-count": accuracy_by_count,
    "training-losses": training_losses,
    "training-accuracy": training_accuracy,
    "throughput": throughput,
    "classifier-cosines": classifier_cosines,
    "cosine-histogram": cosine_histogram,
    "features": features,
    "reliability": reliability,
}
FIGURE_NAMES = tuple(_DRAWN_BY)


def draw_figures(runs: Sequence[RunFindings]) -> dict[str, Figure | Missing]:
    """All figures of at least one run by name; what cannot be drawn is `Missing`, with the reason."""
    figures = {name: draw(runs) for name, draw in _DRAWN_BY.items()}
    assert all(figure.name == name for name, figure in figures.items())
    return figures
