"""The reliability diagram: whether confidence is how often predictions are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import altair as alt

from bce3s.report.figures.figure import Chart, Figure, Missing, Panel
from bce3s.report.figures.parts import chart_of, coloured, names_of, run_tip, sentences
from bce3s.report.findings import RunFindings

if TYPE_CHECKING:
    from bce3s.metrics import Calibration

_SHARE = alt.Scale(domain=[0, 1], nice=False)


def reliability(runs: Sequence[RunFindings]) -> Figure | Missing:
    """Accuracy against confidence by bin, with the diagonal; below, the images of each bin."""
    name, title = "reliability", "Reliability diagram"
    known = [(run, run.calibration) for run in runs if run.calibration]
    if not known:
        return Missing(name=name, title=title, sentence="No calibration was recorded or measured.")
    names = names_of(runs)
    rows = [row for run, calibration in known for row in _bins(run.name, calibration)]
    kinds = sorted({calibration.confidence for _, calibration in known})
    return Figure(
        name=name,
        title=title,
        caption=f"Confidence: the largest {' or '.join(kinds)} of an image. Dashed: confidence is accuracy; below it a network is too sure "
        "of itself. Circles grow with the images of their bin, which the second chart counts.",
        findings=sentences(_finding(run, calibration, bool(names)) for run, calibration in known),
        panels=(
            Panel(title="accuracy by confidence", chart=_diagram(rows, names), height_px=300, square=True),
            Panel(title="images by confidence", chart=_counts(rows, names), height_px=300, square=True),
        ),
        legend=names,
        head=("run", "confidence from", "to", "images", "confidence, mean %", "accuracy, %"),
        rows=tuple(
            (r["run"], r["start"], r["stop"], r["images"], round(100 * r["confidence"], 2), round(100 * r["accuracy"], 2)) for r in rows
        ),
    )


def _bins(run: str, found: Calibration) -> list[dict[str, Any]]:
    """Records of the bins that hold an image."""
    size = len(found.bin_counts)
    columns = zip(found.bin_counts, found.bin_confidence, found.bin_accuracy, strict=True)
    return [
        {
            "run": run,
            "start": round(m / size, 4),
            "stop": round((m + 1) / size, 4),
            "images": count,
            "confidence": confidence,
            "accuracy": accuracy,
        }
        for m, (count, confidence, accuracy) in enumerate(columns)
        if confidence is not None and accuracy is not None
    ]


def _tooltip(names: tuple[str, ...]) -> list[alt.Tooltip]:
    return [
        *run_tip(names),
        alt.Tooltip("confidence:Q", title="mean confidence", format=".1%"),
        alt.Tooltip("accuracy:Q", format=".1%"),
        alt.Tooltip("images:Q", format=","),
    ]


def _diagram(rows: list[dict[str, Any]], names: tuple[str, ...]) -> Chart:
    x = alt.X("confidence:Q", title="mean confidence", scale=_SHARE, axis=alt.Axis(format="%", tickCount=5))
    y = alt.Y("accuracy:Q", title="accuracy", scale=_SHARE, axis=alt.Axis(format="%", tickCount=5))
    diagonal = chart_of([{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}])
    base = chart_of(rows).encode(x=x, y=y, **coloured("run", names))
    area = alt.Size("images:Q", scale=alt.Scale(range=[25, 350]), legend=None)
    return alt.layer(
        diagonal.mark_line(style="guide", aria=False, tooltip=False).encode(x=x, y=y),
        base.mark_line(strokeWidth=1.5, aria=False, tooltip=False),
        base.mark_circle(opacity=0.85, aria=False).encode(size=area, tooltip=_tooltip(names)),
    )


def _counts(rows: list[dict[str, Any]], names: tuple[str, ...]) -> Chart:
    x = alt.X("start:Q", bin="binned", title="confidence", scale=_SHARE, axis=alt.Axis(format="%", tickCount=5, grid=False))
    images = alt.Y("images:Q", title="images", stack=None, axis=alt.Axis(format="~s", tickCount=5))
    if not names:
        return chart_of(rows).mark_bar(aria=False, binSpacing=1).encode(x=x, x2="stop:Q", y=images, tooltip=_tooltip(names))
    # Outlines: filled bars of several runs would hide each other.
    marks = chart_of(rows).mark_bar(filled=False, strokeWidth=2, binSpacing=0, aria=False)
    return marks.encode(x=x, x2="stop:Q", y=images, tooltip=_tooltip(names), **coloured("run", names))


def _finding(run: RunFindings, found: Calibration, named: bool) -> str:
    if found.ece is None:
        return ""
    rows = _bins(run.name, found)
    gap = sum(row["images"] * (row["confidence"] - row["accuracy"]) for row in rows) / sum(row["images"] for row in rows)
    sure = "too sure of itself" if gap > 0.005 else "not sure enough" if gap < -0.005 else "as sure as right on average"
    points = f" by {100 * abs(gap):.1f} points on average" if abs(gap) > 0.005 else ""
    return f"{run.name + ': e' if named else 'E'}xpected calibration error {found.ece:.1f} %, {sure}{points}."
