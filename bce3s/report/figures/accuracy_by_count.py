"""Accuracy of single classes against their training images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from bce3s.report.figures.binned_classes import circles_of, means_of
from bce3s.report.figures.figure import Chart, Figure, Missing, Panel
from bce3s.report.figures.parts import MOST_POINTS, chart_of, coloured, count_axis, group_bands, group_of, names_of, run_tip, sentences
from bce3s.report.findings import RunFindings


def accuracy_by_count(runs: Sequence[RunFindings]) -> Figure | Missing:
    """A point a class; above `MOST_POINTS` of them, circles of classes that lie together, with their mean as a line."""
    name, title = "accuracy-by-count", "Accuracy of each class against its training images"
    known = [run for run in runs if run.per_class_K and run.class_counts_K]
    if not known:
        return Missing(name=name, title=title, sentence="Accuracies of single classes were neither recorded nor measured.")
    names = names_of(runs)
    points = {run.name: _points(run) for run in known}
    counts = [point["count"] for of_run in points.values() for point in of_run]
    binned = len(counts) > MOST_POINTS
    if binned:
        # Circles of several runs would hide each other: a panel each.
        panels = tuple(_binned_panel(run, points[run.name], names, counts) for run in known)
    else:
        panels = (Panel(title="", chart=_point_chart(list(points.values()), names, counts), height_px=320, num_marks=len(counts)),)
    how = "A circle stands for classes of similar count and accuracy, its area for their number; the line is the mean." if binned else ""
    return Figure(
        name=name,
        title=title,
        caption=f"{how or 'A point is a class.'} The axis of counts is logarithmic; shaded: shot groups.",
        findings=sentences(_count_finding(run, points[run.name], bool(names)) for run in known),
        panels=panels,
        legend=() if binned else names,
        **(_bin_table(known, points) if binned else _point_table(points)),
        columns=min(2, len(panels)),
    )


def _points(run: RunFindings) -> list[dict[str, Any]]:
    """Classes with training images and an accuracy, most images first."""
    names = run.class_names or tuple(f"class {k}" for k in range(len(run.class_counts_K)))
    points = [
        {"run": run.name, "class": name, "count": count, "accuracy": round(accuracy, 2), "group": group_of(count)}
        for name, count, accuracy in zip(names, run.class_counts_K, run.per_class_K, strict=True)
        if accuracy is not None and count > 0
    ]
    return sorted(points, key=lambda point: -int(point["count"]))


def _accuracy_axis() -> alt.Y:
    return alt.Y(
        "accuracy:Q", title="top-1 accuracy, %", scale=alt.Scale(domain=[-3, 106], nice=False), axis=alt.Axis(values=[0, 25, 50, 75, 100])
    )


def _point_chart(points: list[list[dict[str, Any]]], names: tuple[str, ...], counts: list[int]) -> Chart:
    tooltip = [alt.Tooltip("class:N"), alt.Tooltip("count:Q", title="training images", format=",")]
    tooltip += [alt.Tooltip("accuracy:Q", title="accuracy, %", format=".1f"), alt.Tooltip("group:N", title="shot group")]
    rows = [point for of_run in points for point in of_run]
    size = 80 if len(rows) <= 60 else 40 if len(rows) <= 300 else 24
    marks = chart_of(rows).mark_point(filled=not names, opacity=0.75 if not names else 1.0, strokeWidth=2, size=size, aria=False)
    layers = [*group_bands(counts)]
    layers += [
        marks.encode(
            x=count_axis(counts),
            y=_accuracy_axis(),
            tooltip=[*run_tip(names), *tooltip],
            **coloured("run", names),
        )
    ]
    return alt.layer(*layers)


def _binned_panel(run: RunFindings, points: list[dict[str, Any]], names: tuple[str, ...], counts: list[int]) -> Panel:
    circles = circles_of(points)
    tooltip = [alt.Tooltip("named:N", title="classes"), alt.Tooltip("classes:Q", title="how many", format=",")]
    tooltip += [
        alt.Tooltip("count:Q", title="training images", format=",.0f"),
        alt.Tooltip("accuracy:Q", title="accuracy, %", format=".1f"),
    ]
    area = alt.Size("classes:Q", scale=alt.Scale(type="linear", range=[8, 420]), legend=None)
    drawn = (
        chart_of(circles).mark_circle(opacity=0.55, aria=False).encode(x=count_axis(counts), y=_accuracy_axis(), size=area, tooltip=tooltip)
    )
    line = chart_of(means_of(circles)).mark_line(strokeWidth=2.5, style="guide", strokeDash=[], aria=False, tooltip=False)
    chart = alt.layer(*group_bands(counts), drawn, line.encode(x=count_axis(counts), y=_accuracy_axis()))
    return Panel(title=run.name if names else "", chart=chart, height_px=340, num_marks=len(circles))


def _point_table(points: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    columns = ("run", "class", "count", "group", "accuracy")
    rows = tuple(tuple(point[name] for name in columns) for of_run in points.values() for point in of_run)
    return {"head": ("run", "class", "training images", "shot group", "accuracy, %"), "rows": rows}


def _bin_table(runs: Sequence[RunFindings], points: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    means = [(run.name, mean) for run in runs for mean in reversed(means_of(circles_of(points[run.name])))]
    rows = tuple((run, mean["count"], mean["classes"], mean["accuracy"]) for run, mean in means)
    return {"head": ("run", "training images, mean", "classes", "accuracy, mean %"), "rows": rows}


def _count_finding(run: RunFindings, points: list[dict[str, Any]], named: bool) -> str:
    """How far accuracy falls from the largest tenth of the classes to the smallest."""
    tenth = max(1, len(points) // 10)
    head, tail = points[:tenth], points[-tenth:]

    def mean(members: list[dict[str, Any]], name: str) -> float:
        return float(np.mean([point[name] for point in members]))

    high, low = mean(head, "accuracy"), mean(tail, "accuracy")
    verb = "falls" if high > low else "rises" if high < low else "stays"
    zero = sum(point["accuracy"] == 0 for point in points)
    never = f"; {zero:,} of {len(points):,} classes are never right" if zero else ""
    return (
        f"{run.name + ': a' if named else 'A'}ccuracy {verb} from {high:.0f} % at {mean(head, 'count'):,.0f} training images "
        f"to {low:.0f} % at {mean(tail, 'count'):,.0f}{never}."
    )
