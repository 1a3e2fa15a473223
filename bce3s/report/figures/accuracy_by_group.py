"""Accuracy by shot group."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from bce3s.report.figures.figure import Cell, Chart, Figure, Missing, Panel
from bce3s.report.figures.parts import chart_of, coloured, names_of, sentences
from bce3s.report.findings import RunFindings

GROUPS = ("all", "many", "medium", "few")
_PERCENT = alt.Scale(domain=[0, 100], nice=False)


def accuracy_by_group(runs: Sequence[RunFindings]) -> Figure | Missing:
    """Bars of the headline by shot group, the runs beside each other."""
    title = "Accuracy by shot group"
    known = [run for run in runs if run.headline]
    if not known:
        return Missing(name="accuracy-by-group", title=title, sentence="No run of this page has been evaluated yet.")
    names = names_of(runs)
    rows = [
        {"run": run.name, "group": group, "accuracy": run.measurements[run.headline][group], "label": _shown(run, group)}
        for run in known
        for group in GROUPS
        if run.measurements[run.headline][group] is not None
    ]
    axis = alt.Axis(labelAngle=0, grid=False)
    base = chart_of(rows).encode(x=alt.X("group:N", sort=list(GROUPS), title=None, axis=axis), y=alt.Y("accuracy:Q", scale=_PERCENT))
    if names:
        base = base.encode(xOffset=alt.XOffset("run:N", sort=list(names)))
    tooltip = [alt.Tooltip("run:N"), alt.Tooltip("group:N"), alt.Tooltip("accuracy:Q", title="accuracy, %", format=".2f")]
    bars = base.mark_bar(aria=False, cornerRadiusEnd=2).encode(
        y=alt.Y("accuracy:Q", title="top-1 accuracy, %", scale=_PERCENT), tooltip=tooltip, **coloured("run", names)
    )
    layers: list[Chart] = [bars]
    if len(rows) <= 8:  # more figures than that run into each other
        layers.append(base.mark_text(style="note", baseline="bottom", dy=-3, aria=False).encode(text="label:N"))
    first = known[0].measurements[known[0].headline]
    empty = [group for group in GROUPS if first[group] is None]
    return Figure(
        name="accuracy-by-group",
        title=title,
        caption="Mean accuracy of the classes of each group; “all” is the share of all images that are right."
        + (f" No class is {' or '.join(empty)}-shot." if empty and len(known) == 1 else ""),
        findings=sentences(_group_finding(run, bool(names)) for run in known),
        panels=(Panel(title="", chart=alt.layer(*layers), height_px=220),),
        legend=names,
        head=("run", "all, %", "many, %", "medium, %", "few, %"),
        rows=tuple((run.name, *(_rounded(run.measurements[run.headline][group]) for group in GROUPS)) for run in known),
        columns=1,
    )


def _shown(run: RunFindings, group: str) -> str:
    value = run.measurements[run.headline][group]
    return "" if value is None else f"{value:.1f}"


def _rounded(value: float | None, digits: int = 2) -> Cell:
    return None if value is None else round(value, digits)


def _group_finding(run: RunFindings, named: bool) -> str:
    figures = run.measurements[run.headline]
    known = [
        f"{figures[group]:.1f} % {words}"
        for group, words in zip(GROUPS, ("of all images", "many", "medium", "few"), strict=True)
        if figures[group] is not None
    ]
    return f"{run.name + ': ' if named else ''}{', '.join(known)}."
