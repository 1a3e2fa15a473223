"""Accuracies by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from bce3s.report.figures.accuracy_by_group import GROUPS
from bce3s.report.figures.figure import Chart, Figure, Missing, Panel
from bce3s.report.figures.parts import chart_of, coloured, epoch_axis, listed, names_of, rounded, sentences
from bce3s.report.findings import RunFindings


def training_accuracy(runs: Sequence[RunFindings]) -> Figure | Missing:
    """Accuracies by epoch: of one run all groups together, of several a panel a group."""
    name, title = "training-accuracy", "Accuracy by epoch"
    known = [run for run in runs if any(point.accuracies for point in run.epochs)]
    if not known:
        return Missing(name=name, title=title, sentence="No epoch was evaluated; --set eval_every=N evaluates every N epochs.")
    if all(sum(bool(point.accuracies) for point in run.epochs) == 1 for run in known):
        once = " ".join(_accuracy_finding(run, len(runs) > 1) for run in known)
        return Missing(name=name, title=title, sentence=f"{once} No curve from one point: --set eval_every=N evaluates every N epochs.")
    rows = [
        {"run": run.name, "epoch": point.epoch, "group": group, "accuracy": round(value, 2)}
        for run in known
        for point in run.epochs
        for group in GROUPS
        if (value := point.accuracies.get(group)) is not None
    ]
    groups = [group for group in GROUPS if any(row["group"] == group for row in rows)]
    names = names_of(runs)
    if names:
        panels = tuple(
            Panel(title=group, chart=_accuracy_chart([row for row in rows if row["group"] == group], "run", names), height_px=190)
            for group in groups
        )
    else:
        panels = (Panel(title="", chart=_accuracy_chart(rows, "group", tuple(groups)), height_px=260),)
    splits = sorted({point.split for run in known for point in run.epochs if point.accuracies})
    return Figure(
        name=name,
        title=title,
        caption=f"Without test-time augmentation, on the {listed(splits)} split.",
        findings=sentences(_accuracy_finding(run, bool(names)) for run in known),
        panels=panels,
        legend=names or tuple(groups) if len(names or groups) > 1 else (),
        head=("run", "epoch", *(f"{group}, %" for group in GROUPS)),
        rows=tuple(
            (run.name, p.epoch, *(rounded(p.accuracies.get(group)) for group in GROUPS))
            for run in known
            for p in run.epochs
            if p.accuracies
        ),
        columns=min(2, len(panels)),
    )


def _accuracy_chart(rows: list[dict[str, Any]], field: str, names: tuple[str, ...]) -> Chart:
    many = max((sum(row["group"] == group for row in rows) for group in GROUPS), default=0) > 60
    line = chart_of(rows).mark_line(strokeWidth=2, point=False if many else alt.OverlayMarkDef(size=45, filled=True), aria=False)
    tooltip = [
        alt.Tooltip("run:N"),
        alt.Tooltip("group:N"),
        alt.Tooltip("epoch:Q"),
        alt.Tooltip("accuracy:Q", title="accuracy, %", format=".2f"),
    ]
    accuracy = alt.Y("accuracy:Q", title="top-1 accuracy, %", scale=alt.Scale(zero=True))
    return line.encode(x=epoch_axis(), y=accuracy, tooltip=tooltip, **coloured(field, names))


def _accuracy_finding(run: RunFindings, named: bool) -> str:
    evaluated = [point for point in run.epochs if point.accuracies.get("all") is not None]
    if not evaluated:
        return ""
    known = [(point.accuracies["all"] or 0.0, -point.epoch) for point in evaluated]
    best, epoch = max(known)[0], -max(known)[1]
    start = f"{run.name + ': ' if named else ''}"
    if len(evaluated) == 1:
        return f"{start}{'evaluated' if named else 'Evaluated'} once, after epoch {epoch}: {best:.1f} %."
    if epoch == evaluated[-1].epoch:
        return f"{start}{'best' if named else 'Best'} at the end, after epoch {epoch}, with {best:.1f} %."
    return f"{start}{'best' if named else 'Best'} after epoch {epoch} with {best:.1f} %, {known[-1][0]:.1f} % after epoch {-known[-1][1]}."
