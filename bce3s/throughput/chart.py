"""The profile as a bar chart."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bce3s.throughput.rows import SECTIONS, Row
from bce3s.throughput.verdict import Verdict
from pipelines.config import require
from pipelines.types import BackendError

CHART_SUFFIXES = (".png", ".svg")
_COLOURS = {
    "storage": "#7a8a99",
    "read": "#7a8a99",
    "decode": "#4b8b3b",
    "loader": "#4b8b3b",
    "copy": "#7a5195",
    "step": "#0b5fa5",
    "part": "#8fb4d6",
    "together": "#d1603d",
}

_TITLE_CHARACTERS = 100  # a line, at the figure's width
_BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def require_chart(path: Path) -> None:
    """Raises where a chart could not be written later.

    Raises:
        ConfigError: neither PNG nor SVG.
        BackendError: matplotlib is missing.
    """
    require(path.suffix.lower() in CHART_SUFFIXES, f"--plot writes {' or '.join(CHART_SUFFIXES)}, not '{path.name}'")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendError("--plot needs matplotlib; run pip install 'bce3s[report]'") from error


def draw_chart(rows: Sequence[Row], verdict: Verdict | None, title: str, suffix: str) -> bytes:
    """A horizontal bar for every measured row, its range as a line, on a logarithmic axis; the image as ".png" or ".svg"."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.rates]
    require(bool(measured), "no row was measured, so --plot has nothing to draw")
    figure = Figure(figsize=(8.0, 1.1 + 0.25 * len(measured)), layout="constrained")
    axes: Any = figure.subplots()
    positions = range(len(measured))
    medians = [row.median for row in measured]
    lowest = min(min(row.rates) for row in measured) / 3
    errors = [[row.median - min(row.rates) for row in measured], [max(row.rates) - row.median for row in measured]]
    colours = [_COLOURS[row.key.partition(".")[0]] for row in measured]
    axes.barh(
        positions,
        [median - lowest for median in medians],
        left=lowest,
        xerr=errors,
        color=colours,
        error_kw={"lw": 0.8, "capsize": 2, "ecolor": "#333333"},
        height=0.72,
    )
    for position, row in enumerate(measured):
        shown = f"{row.median:,.0f}" if row.median >= 100 else f"{row.median:.1f}"
        axes.text(max(row.rates) * 1.12, position, shown, va="center", fontsize=8, bbox=_BEHIND)
    labels = [row.name + (", binds" if verdict is not None and row.key == verdict.binding else "") for row in measured]
    axes.set_yticks(positions, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(lowest, max(max(row.rates) for row in measured) * 4)
    axes.set_xlabel("decoded images/s (× 3/2: forward views/s)")
    if verdict is not None:
        axes.axvline(verdict.required, color="#0b5fa5", lw=1.2, ls="--", zorder=0)
        axes.annotate(
            f"the loader must deliver {verdict.required:,.0f}",
            (verdict.required, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="#0b5fa5",
        )
    # Over the whole figure and not over the bars alone: beside their labels it would be cut off.
    figure.suptitle(textwrap.fill(title, _TITLE_CHARACTERS), fontsize=10, x=0.01, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.lower().lstrip("."), dpi=160)
    return buffer.getvalue()


assert set(_COLOURS) == set(SECTIONS)
