"""Features of every class from head to tail: how compact it is, how far from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np

from bce3s.report.figures.figure import Figure, Missing, Panel
from bce3s.report.figures.parts import MOST_POINTS, chart_of, coloured, count_axis, group_bands, listed, names_of, run_tip, sentences
from bce3s.report.findings import RunFindings

if TYPE_CHECKING:
    from bce3s.metrics import FeatureGeometry

_QUANTITIES = {"compactness": "compactness", "separability": "separability", "nearest": "cosine with the nearest class"}
_COUNT_BINS = 40


def features(runs: Sequence[RunFindings]) -> Figure | Missing:
    """Panels of compactness, separability and the nearest class, against training images; bins of classes where there are many."""
    name, title = "features", "Features, head to tail"
    known = [(run, run.measured.geometry) for run in runs if run.measured and run.measured.geometry]
    if not known:
        return Missing(name=name, title=title, sentence="The features of single classes were not measured.")
    names = names_of(runs)
    rows = [row for run, geometry in known for row in _classes(run, geometry)]
    counts = [row["count"] for row in rows]
    binned = len(rows) > MOST_POINTS
    shown = [row for run, _ in known for row in _bins([row for row in rows if row["run"] == run.name])] if binned else rows
    return Figure(
        name=name,
        title=title,
        caption="Cosines of the features of the evaluated images. Compactness: mean over pairs of one class; separability: 1 − the mean "
        "cosine of a class mean with the others'; nearest: cosine with the closest other class mean."
        + (" A point is the mean of the classes of similar counts." if binned else " A point is a class."),
        findings=sentences(_finding(run, geometry, bool(names)) for run, geometry in known),
        panels=tuple(_panel(quantity, shown, counts, names) for quantity in _QUANTITIES),
        legend=names,
        head=("run", "class" if not binned else "classes", "training images", *_QUANTITIES.values()),
        rows=tuple((row["run"], row["class"], row["count"], *(row[quantity] for quantity in _QUANTITIES)) for row in shown),
        columns=3,
    )


def _classes(run: RunFindings, geometry: FeatureGeometry) -> list[dict[str, Any]]:
    """One record a class that has training images, most first."""
    means = iter(geometry.class_means.mean_K if geometry.class_means else ())  # of the classes that have evaluated images
    separability_K = [1.0 - next(means, np.nan) if nearest is not None else None for nearest in geometry.nearest_K]
    names = run.class_names or tuple(f"class {k}" for k in range(len(run.class_counts_K)))
    columns = zip(names, run.class_counts_K, geometry.compactness_K, separability_K, geometry.nearest_K, strict=True)
    rows = [
        {
            "run": run.name,
            "class": name,
            "count": count,
            "compactness": _rounded(compact),
            "separability": _rounded(apart),
            "nearest": _rounded(near),
        }
        for name, count, compact, apart, near in columns
        if count > 0
    ]
    return sorted(rows, key=lambda row: -int(row["count"]))


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)


def _bins(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over classes of similar counts, at most _COUNT_BINS of them."""
    logs = np.log([row["count"] for row in rows])
    span = max(float(logs.max() - logs.min()), 1e-9)
    bins = np.minimum((logs - logs.min()) / span * _COUNT_BINS, _COUNT_BINS - 1).astype(int)
    found = []
    for number in np.unique(bins)[::-1].tolist():
        members = [row for row, own in zip(rows, bins.tolist(), strict=True) if own == number]
        record: dict[str, Any] = {"run": members[0]["run"], "class": f"{len(members):,} classes"}
        record["count"] = round(float(np.exp(np.mean(np.log([row["count"] for row in members])))), 1)
        for quantity in _QUANTITIES:
            values = [row[quantity] for row in members if row[quantity] is not None]
            record[quantity] = _rounded(float(np.mean(values))) if values else None
        found.append(record)
    return found


def _panel(quantity: str, rows: list[dict[str, Any]], counts: list[int], names: tuple[str, ...]) -> Panel:
    shown = [{name: row[name] for name in ("run", "class", "count", quantity)} for row in rows if row[quantity] is not None]
    tooltip = [
        *run_tip(names),
        alt.Tooltip("class:N"),
        alt.Tooltip("count:Q", title="training images", format=","),
    ]
    tooltip.append(alt.Tooltip(f"{quantity}:Q", format=".3f"))
    marks = chart_of(shown).mark_point(
        filled=not names, opacity=0.75 if not names else 1.0, strokeWidth=2, size=60 if len(shown) <= 60 else 24, aria=False
    )
    y = alt.Y(f"{quantity}:Q", title=None, scale=alt.Scale(zero=False, padding=16), axis=alt.Axis(format=".3~g", tickCount=5))
    drawn = marks.encode(x=count_axis(counts), y=y, tooltip=tooltip, **coloured("run", names))
    return Panel(title=_QUANTITIES[quantity], chart=alt.layer(*group_bands(counts), drawn), height_px=220, num_marks=len(shown))


def _finding(run: RunFindings, geometry: FeatureGeometry, named: bool) -> str:
    groups = [group for group in ("many", "medium", "few") if geometry.compactness[group].mean is not None]
    compact = listed([f"{geometry.compactness[group].mean:.2f} ({group})" for group in groups]) if groups else "not defined"
    apart = listed(
        [f"{geometry.separability[group].mean:.2f} ({group})" for group in groups if geometry.separability[group].mean is not None]
        or ["not defined"]
    )
    return f"{run.name + ': c' if named else 'C'}ompactness {compact}; separability {apart}."
