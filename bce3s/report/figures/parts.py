"""What charts of several figures share: data, axes, the colour of a run, and the bands of the shot groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from bce3s.report.figures.figure import Chart
from bce3s.report.findings import RunFindings

MOST_POINTS = 1_000
"""Points of one chart that can be told apart, hovered over and drawn at once; more are counted into bins."""
GROUP_TITLES = {"many": "many-shot", "medium": "medium-shot", "few": "few-shot"}
_GROUP_BOUNDS = {"few": (0.0, 20.0), "medium": (20.0, 100.0), "many": (100.0, math.inf)}
_BAND_OPACITIES = {"few": 0.14, "medium": 0.07, "many": 0.0}

Rows = Sequence[dict[str, Any]]


def chart_of(rows: Rows) -> alt.Chart:
    """A chart of these records, which are kept as they are."""
    return alt.Chart(alt.InlineData(values=list(rows)))


def names_of(runs: Sequence[RunFindings]) -> tuple[str, ...]:
    """What the colours mean; empty for one run."""
    return tuple(run.name for run in runs) if len(runs) > 1 else ()


def coloured(field: str, names: Sequence[str]) -> dict[str, Any]:
    """The colour channel by `field`, the first of `names` in the first colour; nothing for fewer than two."""
    if len(names) < 2:
        return {}
    legend = alt.Legend(title=None, columns=1 if max(map(len, names)) > 16 else len(names))
    return {"color": alt.Color(f"{field}:N", scale=alt.Scale(domain=list(names)), legend=legend)}


def run_tip(names: Sequence[str]) -> list[alt.Tooltip]:
    """Says the run of a mark where there are several."""
    return [alt.Tooltip("run:N")] if len(names) > 1 else []


def count_axis(counts: Iterable[int], title: str = "training images") -> alt.X:
    """A logarithmic axis of training counts, wide enough for points at its ends."""
    low, high = _bounds(counts)
    return alt.X("count:Q", title=title, scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=log_axis(low, high))


def epoch_axis() -> alt.X:
    """Epochs done."""
    return alt.X("epoch:Q", title="epoch", scale=alt.Scale(nice=False), axis=alt.Axis(grid=False, tickMinStep=1, format="~g"))


def log_axis(low: float, high: float) -> alt.Axis:
    """Labelled at the powers of ten, over less than three of them also at twos and fives."""
    steps = (1,) if math.log10(high / low) >= 3 else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return alt.Axis(values=[tick for tick in ticks if low <= tick <= high], format="~s", grid=False)


def _bounds(counts: Iterable[int]) -> tuple[float, float]:
    shown = [count for count in counts if count > 0] or [1]
    return min(shown) / 1.25, max(shown) * 1.25


def group_bands(counts: Iterable[int]) -> list[Chart]:
    """Behind a chart over `count_axis`: the shot groups that reach into it, shaded and named."""
    low, high = _bounds(counts)
    bands: list[dict[str, Any]] = []
    for group, (start, stop) in _GROUP_BOUNDS.items():
        start, stop = max(start, low), min(stop, high)
        if start < stop:
            middle = math.sqrt(start * stop)
            bands.append({"start": start, "stop": stop, "middle": middle, "group": group, "opacity": _BAND_OPACITIES[group]})
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    base = chart_of(bands)
    shaded = base.mark_rect(style="band", aria=False, tooltip=False).encode(
        x=alt.X("start:Q", scale=scale), x2="stop:Q", opacity=alt.Opacity("opacity:Q", scale=None, legend=None)
    )
    # A name that does not fit its band is left out: the axis says as much.
    wide = [band for band in bands if math.log(band["stop"] / band["start"]) > 0.12 * math.log(high / low)]
    named = chart_of(wide).mark_text(style="note", baseline="top", y=4, aria=False, tooltip=False)
    return [shaded, named.encode(x=alt.X("middle:Q", scale=scale), text="group:N")]


def group_of(count: int) -> str:
    """The shot group of a class of `count` training images."""
    return "many" if count > 100 else "few" if count < 20 else "medium"


def listed(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def signed(value: float, digits: int) -> str:
    """With a minus that reads as one: '−0.11'."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # + 0.0: no minus before nothing


def sentences(found: Iterable[str]) -> tuple[str, ...]:
    """Those that say something."""
    return tuple(sentence for sentence in found if sentence)


def rounded(value: float | None) -> float | None:
    """To five figures: more would only make the page larger."""
    return None if value is None else float(f"{value:.5g}")
