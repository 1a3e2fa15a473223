"""Throughput over time, and the share of it spent waiting for data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import altair as alt

from bce3s.report.figures.figure import Chart, Figure, Missing, Panel
from bce3s.report.figures.parts import chart_of, coloured, epoch_axis, names_of, rounded, run_tip, sentences
from bce3s.report.findings import RunFindings, StepPoint

_WELL_FED = 0.05
"""Up to this share of waiting, the loader is not what a run waits for."""
_GIB = float(1 << 30)


def throughput(runs: Sequence[RunFindings]) -> Figure | Missing:
    """Panels of source images/s, data-wait share, and device memory where the log has it."""
    name, title = "throughput", "Throughput and waiting for data"
    known = [run for run in runs if run.steps]
    if not known:
        return Missing(name=name, title=title, sentence="The log has no line of training steps.")
    names = names_of(runs)
    values = {
        "source images/s": [(run.name, p.epoch, p.images_per_s) for run in known for p in run.steps],
        "data-wait share": [(run.name, p.epoch, p.data_wait_share) for run in known for p in run.steps],
        "device memory, GiB": [
            (run.name, p.epoch, p.device_memory_bytes / _GIB) for run in known for p in run.steps if p.device_memory_bytes is not None
        ],
    }
    return Figure(
        name=name,
        title=title,
        caption="Means over the steps between two lines of the log. Data-wait share: of the time, how much the step waited for its batch.",
        findings=sentences(_finding(run, bool(names)) for run in known),
        panels=tuple(_panel(quantity, points, names) for quantity, points in values.items() if points),
        legend=names,
        head=("run", "epoch", "source images/s", "data-wait share, %", "seconds"),
        rows=tuple(
            (run.name, p.epoch, round(p.images_per_s, 1), round(100 * p.data_wait_share, 2), round(p.train_s, 1))
            for run in known
            for p in run.epochs
        ),
    )


def _panel(quantity: str, points: list[tuple[str, float, float]], names: tuple[str, ...]) -> Panel:
    rows = [{"run": run, "epoch": round(epoch, 3), "value": rounded(value)} for run, epoch, value in points]
    is_share = quantity == "data-wait share"
    # From 0 to at least a fifth: a share of one percent is to look like nothing, not like a mountain.
    top = max(0.2, min(1.0, 1.1 * max(value for *_, value in points)))
    scale = alt.Scale(domain=[0, top], nice=False) if is_share else alt.Scale(zero=True)
    shown = ".1%" if is_share else ",.4~g"
    tooltip = [
        *run_tip(names),
        alt.Tooltip("epoch:Q", format=".2f"),
        alt.Tooltip("value:Q", title=quantity, format=shown),
    ]
    line = chart_of(rows).mark_line(strokeWidth=1.5, aria=False)
    drawn = line.encode(
        x=epoch_axis(),
        y=alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(format="%" if is_share else "~s", tickCount=5)),
        tooltip=tooltip,
        **coloured("run", names),
    )
    layers: list[Chart] = [drawn]
    if is_share:
        rule = chart_of([{"value": _WELL_FED}]).mark_rule(style="guide", aria=False)
        layers.append(rule.encode(y="value:Q", tooltip=alt.Tooltip("value:Q", title="well fed up to", format=".0%")))
    return Panel(title=quantity + (" (well fed below the dashed line)" if is_share else ""), chart=alt.layer(*layers), height_px=190)


def _finding(run: RunFindings, named: bool) -> str:
    rate = statistics.median(point.images_per_s for point in run.steps)
    views = [point.views_per_s for point in run.steps if point.views_per_s is not None]
    waits = statistics.median(point.data_wait_share for point in run.steps)
    verdict = "the device is well fed" if waits <= _WELL_FED else "the loader is too slow: see bce3s profile --shards … for what binds"
    slow = _slowest(run.steps, rate)
    return (
        f"{run.name + ': ' if named else ''}{rate:,.0f} source images/s"
        + (f" ({statistics.median(views):,.0f} views/s)" if views else "")
        + f" in the median, {100 * waits:.1f} % of the time waiting for data: {verdict}.{slow}"
    )


def _slowest(steps: tuple[StepPoint, ...], rate: float) -> str:
    slow = min(steps, key=lambda point: point.images_per_s)
    return f" Slowest: {slow.images_per_s:,.0f} images/s at epoch {slow.epoch:.1f}." if slow.images_per_s < 0.7 * rate else ""
