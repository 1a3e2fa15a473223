"""A figure of a report: charts, what they say in words, and their numbers as a table. The same charts go on the page and into files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt

from bce3s.report.figures.style import THEMES, vega_config
from pipelines.config import require_choice

Chart = Any  # altair's: what its operators return is a union of four kinds, all of which a page can draw
Cell = str | float | int | None
FORMATS = ("png", "svg")

_STATIC_WIDTH_PX = 420
_STATIC_SCALE = 2.0
MOST_SVG_MARKS = 1_200
"""Above so many marks in a chart, a browser draws pixels instead of elements."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart.

    Args:
        title: above it; empty is none.
        chart: without width, which it takes from its place.
        height_px: of its axes.
        num_marks: about how many it draws.
        square: it is as wide as high.
    """

    title: str
    chart: Chart
    height_px: int = 260
    num_marks: int = 0
    square: bool = False

    def page_spec(self, *, legend: bool) -> dict[str, Any]:
        """Vega-Lite for the page: as wide as the element that holds it, with the chart's own legend or without."""
        # Checking it against the schema takes most of a page's time and tells a reader nothing; tests do, by `static_spec`.
        spec: dict[str, Any] = self.chart.properties(width="container", height=self.height_px).to_dict(validate=False)
        spec.pop("config", None)  # altair's own sizes; colours and lettering come with the theme
        spec.pop("$schema", None)
        if not legend:
            for layer in spec.get("layer", [spec]):
                if "color" in layer.get("encoding", {}):
                    layer["encoding"]["color"]["legend"] = None
        return spec

    def static_chart(self) -> Chart:
        """Of fixed width, under its title."""
        width = self.height_px if self.square else _STATIC_WIDTH_PX
        titled = self.chart.properties(title=self.title) if self.title else self.chart
        return titled.properties(width=width, height=self.height_px)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Charts that belong together.

    Args:
        name: of its files, and its anchor on the page.
        title: short.
        caption: what is drawn, and how to read it.
        findings: what the numbers say, a sentence a run.
        panels: its charts.
        legend: what the colours of the series mean, in their order; empty where there is one alone.
        head: names of the table's columns.
        rows: its cells; None is not known.
        columns: charts beside each other in a file.
    """

    name: str
    title: str
    caption: str
    findings: tuple[str, ...]
    panels: tuple[Panel, ...]
    legend: tuple[str, ...] = ()
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    columns: int = 2

    def static_spec(self) -> dict[str, Any]:
        """Vega-Lite of all charts in one picture."""
        charts = [panel.static_chart() for panel in self.panels]
        together = alt.concat(*charts, columns=self.columns, spacing=28).resolve_scale(color="shared" if self.legend else "independent")
        spec: dict[str, Any] = together.to_dict()
        spec.pop("config", None)
        return spec

    def image(self, image_format: str) -> bytes:
        """A file of it, light on white: "png", twice as fine as a screen, or "svg"."""
        import vl_convert

        require_choice("--format", image_format, FORMATS)
        version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])  # of Vega-Lite, that altair writes
        options: dict[str, Any] = {"vl_version": version, "config": vega_config(THEMES["light"], "white"), "allowed_base_urls": []}
        if image_format == "svg":
            return str(vl_convert.vegalite_to_svg(self.static_spec(), **options)).encode()
        return bytes(vl_convert.vegalite_to_png(self.static_spec(), scale=_STATIC_SCALE, **options))


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A figure that cannot be drawn.

    Args:
        name, title: of the figure.
        sentence: why.
    """

    name: str
    title: str
    sentence: str
