"""The long tail itself: training images of every class, from the largest to the smallest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from bce3s.report.figures.figure import Chart, Figure, Missing, Panel
from bce3s.report.figures.parts import GROUP_TITLES, chart_of, coloured, group_of, listed, log_axis, sentences
from bce3s.report.findings import RunFindings

NAME, TITLE = "class-counts", "Training images of each class"
_MOST_RANKS = 400
_BAND_OPACITIES = {"many": 0.0, "medium": 0.07, "few": 0.14}


def class_counts(runs: Sequence[RunFindings]) -> Figure | Missing:
    """One curve for each data set of the runs, over the classes sorted by their counts; shot groups are shaded."""
    sets: dict[tuple[int, ...], list[RunFindings]] = {}
    for run in runs:
        if run.class_counts_K:
            sets.setdefault(run.class_counts_K, []).append(run)
    if not sets:
        return Missing(name=NAME, title=TITLE, sentence="The class counts are not known: neither shards nor checkpoint are there any more.")
    labels = _labels(list(sets.values()))
    points = [point for counts, label in zip(sets, labels, strict=True) for point in _points(sets[counts][0], label)]
    return Figure(
        name=NAME,
        title=TITLE,
        caption="Classes from head to tail; the axis of counts is logarithmic."
        + (" Shaded: shot groups by training images (many > 100, medium 20–100, few < 20)." if len(sets) == 1 else ""),
        findings=sentences(
            _finding(members[0], label if len(sets) > 1 else "") for label, members in zip(labels, sets.values(), strict=True)
        ),
        panels=(Panel(title="", chart=_chart(points, labels, next(iter(sets))), height_px=220),),
        legend=tuple(labels) if len(labels) > 1 else (),
        head=("data set", "rank", "class", "training images", "shot group"),
        rows=tuple((p["set"], p["rank"], p["class"], p["count"], p["group"]) for p in points),
        columns=1,
    )


def _labels(sets: list[list[RunFindings]]) -> list[str]:
    if len(sets) == 1:
        return [sets[0][0].dataset]
    return [f"{members[0].dataset} ({listed([run.name for run in members])})" for members in sets]


def _points(run: RunFindings, label: str) -> list[dict[str, Any]]:
    counts_K = np.array(run.class_counts_K)
    order = np.argsort(-counts_K, kind="stable")
    ranks = np.unique(np.linspace(0, len(order) - 1, min(len(order), _MOST_RANKS)).round().astype(int))
    names = run.class_names or tuple(f"class {k}" for k in range(len(counts_K)))
    chosen = [(int(rank) + 1, int(order[rank])) for rank in ranks]
    return [
        {"set": label, "rank": rank, "class": names[k], "count": run.class_counts_K[k], "group": group_of(run.class_counts_K[k])}
        for rank, k in chosen
        if run.class_counts_K[k] > 0  # a class without images has no place on a logarithmic axis
    ]


def _chart(points: list[dict[str, Any]], labels: list[str], counts: tuple[int, ...]) -> Chart:
    ranks = alt.Scale(domain=[0.5, len(counts) + 0.5], nice=False) if len(labels) == 1 else alt.Scale(nice=False)
    known = [count for count in counts if count > 0] or [1]
    low, high = min(known) / 1.5, max(known) * 1.5
    heights = alt.Scale(type="log", domain=[low, high], nice=False) if len(labels) == 1 else alt.Scale(type="log", nice=False)
    shown_axis = log_axis(low, high) if len(labels) == 1 else alt.Axis(format="~s")
    curve = chart_of(points).mark_line(interpolate="step", strokeWidth=2, aria=False)
    if len(counts) <= 50:
        curve = chart_of(points).mark_line(point=alt.OverlayMarkDef(size=45, filled=True), strokeWidth=1.5, aria=False)
    curve = curve.encode(
        x=alt.X("rank:Q", title="classes, head to tail", scale=ranks, axis=alt.Axis(grid=False, tickMinStep=1, format=",d")),
        y=alt.Y("count:Q", title="training images", scale=heights, axis=shown_axis),
        tooltip=[
            *(alt.Tooltip("class:N"), alt.Tooltip("rank:Q"), alt.Tooltip("count:Q", title="training images", format=",")),
            alt.Tooltip("group:N", title="shot group"),
        ],
        **coloured("set", labels),
    )
    return alt.layer(*_rank_bands(counts, ranks), curve) if len(labels) == 1 else curve


def _rank_bands(counts: tuple[int, ...], ranks: alt.Scale) -> list[Chart]:
    """Shot groups as ranges of ranks: classes are sorted by their counts, so each is one range."""
    bands, start = [], 0.5
    for group in GROUP_TITLES:
        size = sum(group_of(count) == group for count in counts)
        if size:
            # Short names fit where long ones would run into the next band.
            words = f"{group}: {size:,}" if size > 0.16 * len(counts) else ""
            opacity = _BAND_OPACITIES[group]
            bands.append({"start": start, "stop": start + size, "middle": start + size / 2, "words": words, "opacity": opacity})
        start += size
    base = chart_of(bands)
    shaded = base.mark_rect(style="band", aria=False, tooltip=False)
    shaded = shaded.encode(x=alt.X("start:Q", scale=ranks), x2="stop:Q", opacity=alt.Opacity("opacity:Q", scale=None, legend=None))
    named = base.mark_text(style="note", baseline="top", y=4, aria=False, tooltip=False)
    return [shaded, named.encode(x=alt.X("middle:Q", scale=ranks), text="words:N")]


def _finding(run: RunFindings, label: str) -> str:
    counts = run.class_counts_K
    sizes = {group: sum(group_of(count) == group for count in counts) for group in GROUP_TITLES}
    groups = listed([f"{size:,} {GROUP_TITLES[group]}" for group, size in sizes.items() if size])
    factor = f", an imbalance factor of {run.imbalance_factor:,.{0 if run.imbalance_factor >= 10 else 1}f}" if run.imbalance_factor else ""
    return (
        f"{label + ': ' if label else ''}{len(counts):,} classes of {max(counts):,} down to {min(counts):,} training images{factor}: "
        f"{groups} classes."
    )
