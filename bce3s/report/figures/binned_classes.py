"""Many classes as few circles: those of similar count and accuracy lie together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_COUNT_BINS, _ACCURACY_BINS, _NAMED_CLASSES = 36, 20, 5


def circles_of(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of records with "class", "count" and "accuracy", most images first: at most 36 × 20 circles, each at the means of its classes."""
    logs = np.log([point["count"] for point in points])
    span = max(float(logs.max() - logs.min()), 1e-9)
    columns = np.minimum((logs - logs.min()) / span * _COUNT_BINS, _COUNT_BINS - 1).astype(int)
    rows = np.minimum(np.array([point["accuracy"] for point in points]) / 100 * _ACCURACY_BINS, _ACCURACY_BINS - 1).astype(int)
    members: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for point, column, row in zip(points, columns.tolist(), rows.tolist(), strict=True):
        members.setdefault((column, row), []).append(point)
    return [_circle(of_bin, column) for (column, _), of_bin in sorted(members.items(), key=lambda item: item[0])]


def _circle(members: list[dict[str, Any]], column: int) -> dict[str, Any]:
    shown = ", ".join(str(point["class"]) for point in members[:_NAMED_CLASSES])
    rest = len(members) - _NAMED_CLASSES
    return {
        "count": round(math.exp(float(np.mean(np.log([point["count"] for point in members])))), 1),
        "accuracy": round(float(np.mean([point["accuracy"] for point in members])), 2),
        "classes": len(members),
        "named": f"{shown} and {rest:,} more" if rest > 0 else shown,
        "column": column,
    }


def means_of(circles: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy of all classes of each column of circles."""
    found = []
    for column in sorted({circle["column"] for circle in circles}):
        members = [circle for circle in circles if circle["column"] == column]
        weights = [circle["classes"] for circle in members]
        mean = {name: round(float(np.average([circle[name] for circle in members], weights=weights)), 2) for name in ("count", "accuracy")}
        found.append({**mean, "classes": sum(weights)})
    return found
