"""The classifier's rows: cosines of all pairs against the simplex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from bce3s.report.figures.figure import Chart, Figure, Missing, Panel
from bce3s.report.figures.parts import chart_of, coloured, names_of, run_tip, sentences, signed
from bce3s.report.findings import CosineHistogram, RunFindings


def cosine_histogram(runs: Sequence[RunFindings]) -> Figure | Missing:
    """Share of all pairs by cosine, with the simplex value."""
    name, title = "cosine-histogram", "Cosines against the simplex"
    known = [(run, run.measured.histogram) for run in runs if run.measured and run.measured.histogram]
    if not known:
        return Missing(name=name, title=title, sentence="The cosines of the classifier's rows were not measured.")
    names = names_of(runs)
    bins = [row for run, histogram in known for row in _bins(run.name, histogram)]
    filled = [row for row in bins if row["share"] > 0]
    margin = 2 * (known[0][1].edges[1] - known[0][1].edges[0])
    simplex = sorted({round(histogram.simplex, 6) for _, histogram in known})
    low = min([row["start"] for row in filled] + simplex) - margin
    high = max([row["stop"] for row in filled] + simplex) + margin
    shown = [row for row in bins if row["stop"] > low and row["start"] < high]  # empty ones in between too
    return Figure(
        name=name,
        title=title,
        caption="Over all pairs of rows. Dashed: the simplex value −1/(K−1), where all lie once they are as far apart as can be.",
        findings=sentences(_finding(run, histogram, bool(names)) for run, histogram in known),
        panels=(Panel(title="", chart=_chart(shown, names, (max(-1.0, low), min(1.0, high)), simplex), height_px=260),),
        legend=names,
        head=("run", "cosine from", "to", "pairs", "share, %"),
        rows=tuple((r["run"], r["start"], r["stop"], r["pairs"], round(100 * r["share"], 3)) for r in filled),
        columns=1,
    )


def _bins(run: str, found: CosineHistogram) -> list[dict[str, Any]]:
    bounds = zip(found.edges[:-1], found.edges[1:], found.counts, strict=True)
    return [
        {"run": run, "start": round(start, 5), "stop": round(stop, 5), "pairs": count, "share": count / max(found.num_pairs, 1)}
        for start, stop, count in bounds
    ]


def _chart(rows: list[dict[str, Any]], names: tuple[str, ...], bounds: tuple[float, float], simplex: list[float]) -> Chart:
    """Bars of one run; of several, outlines of their densities, for their bins may differ in width."""
    axes: dict[str, Any] = {"title": "cosine of a pair of rows", "scale": alt.Scale(domain=list(bounds), nice=False)}
    tooltip = [*run_tip(names), alt.Tooltip("start:Q", title="cosine from", format=".3f")]
    tooltip += [alt.Tooltip("stop:Q", title="to", format=".3f"), alt.Tooltip("pairs:Q", format=","), alt.Tooltip("share:Q", format=".1%")]
    if names:
        marks = chart_of([*rows, *_ends(rows)]).transform_calculate(density="datum.share / (datum.stop - datum.start)")
        outline = marks.mark_area(interpolate="step-after", line=alt.OverlayMarkDef(strokeWidth=2), fillOpacity=0.15, aria=False)
        density = alt.Y("density:Q", title="density of pairs", stack=None, axis=alt.Axis(tickCount=5))
        x = alt.X("start:Q", axis=alt.Axis(grid=False, tickCount=8), **axes)
        drawn = outline.encode(x=x, y=density, tooltip=tooltip, **coloured("run", names))
    else:
        share = alt.Y("share:Q", title="share of pairs", axis=alt.Axis(format="%", tickCount=5))
        x = alt.X("start:Q", bin="binned", axis=alt.Axis(grid=False, tickCount=8), **axes)
        drawn = chart_of(rows).mark_bar(aria=False, binSpacing=1, opacity=0.7).encode(x=x, x2="stop:Q", y=share, tooltip=tooltip)
    rule = chart_of([{"simplex": value} for value in simplex]).mark_rule(style="ideal", aria=False)
    return alt.layer(drawn, rule.encode(x="simplex:Q", tooltip=alt.Tooltip("simplex:Q", title="simplex", format=".4f")))


def _ends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where each run's outline comes up from nothing, and down to it."""
    first, last = {row["run"]: row for row in reversed(rows)}, {row["run"]: row for row in rows}
    shifts = [(row, row["start"] - row["stop"]) for row in first.values()] + [(row, row["stop"] - row["start"]) for row in last.values()]
    return [{**row, "start": row["start"] + by, "stop": row["stop"] + by, "pairs": 0, "share": 0.0} for row, by in shifts]


def _finding(run: RunFindings, found: CosineHistogram, named: bool) -> str:
    middles = [(start + stop) / 2 for start, stop in zip(found.edges[:-1], found.edges[1:], strict=True)]
    pairs = max(found.num_pairs, 1)
    exact = run.measured.geometry.classifier if run.measured and run.measured.geometry else None
    mean = exact.mean if exact else sum(middle * count for middle, count in zip(middles, found.counts, strict=True)) / pairs
    spread = f" ± {exact.std:.3f}" if exact else ""
    start = f"{run.name}: mean" if named else "Mean"
    return f"{start} cosine {signed(mean, 3)}{spread} over {found.num_pairs:,} pairs; the simplex is at {signed(found.simplex, 4)}."
