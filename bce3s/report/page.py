"""The page: one HTML file with its charts, pictures and tables, that asks for nothing over a network."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bce3s import __version__
from bce3s.report.figures import MOST_SVG_MARKS, THEMES, Figure, Missing, vega_config
from bce3s.report.findings import Findings, RunFindings
from bce3s.report.tables import (
    Table,
    environment_table,
    feature_table,
    figure_table,
    headline_label,
    headline_table,
    settings_table,
)


@dataclass(frozen=True)
class _Section:
    name: str  # of findings.SECTIONS: where notes go; also its anchor
    title: str
    figures: tuple[str, ...]


_SECTIONS = (
    _Section("headline", "Accuracy", ("accuracy-by-group", "class-counts")),
    _Section("classes", "Accuracy against training images", ("accuracy-by-count",)),
    _Section("training", "Training", ("training-losses", "training-accuracy")),
    _Section("throughput", "Throughput", ("throughput",)),
    _Section("classifier", "Classifier", ("classifier-cosines", "cosine-histogram")),
    _Section("features", "Features", ("features",)),
    _Section("confusions", "Most confused", ()),
    _Section("calibration", "Reliability", ("reliability",)),
    _Section("settings", "Settings, environment and commands", ()),
)


def render_page(found: Findings, figures: Mapping[str, Figure | Missing]) -> str:
    """The whole page.

    Args:
        found: of at least one run.
        figures: by name, as `bce3s.report.figures.draw_figures` gives them.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bce3s.report", "template"),
        autoescape=True,  # names of classes and folders are whatever somebody wrote
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _cell
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    return environment.get_template("page.html.j2").render(
        **{"title": _title(found.runs), "runs": found.runs, "seeds": found.seeds, "version": __version__},
        **{"sections": _SECTIONS, "figures": figures, "notes": _notes(found.runs), "themes": THEMES},
        **{"headline": headline_table(found.runs), "labels": _labels(found.runs)},
        **{"tables": {name: figure_table(figure) for name, figure in figures.items() if isinstance(figure, Figure)}},
        **{"feature_groups": feature_table(found.runs), "settings": _settings(found.runs), "environment": environment_table(found.runs)},
        charts=_charts(figures),
        configs={name: vega_config(theme) for name, theme in THEMES.items()},
        vega=_vega(),
    )


@functools.cache
def _vega() -> str:
    """The drawing library's JavaScript, about 0.9 MB, which takes seconds to put together."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _title(runs: Sequence[RunFindings]) -> str:
    return runs[0].title if len(runs) == 1 else f"{len(runs)} runs on {', '.join(dict.fromkeys(run.dataset for run in runs))}"


def _labels(runs: Sequence[RunFindings]) -> dict[str, list[str]]:
    """How results were measured → the runs of which that is so."""
    labels: dict[str, list[str]] = {}
    for run in runs:
        labels.setdefault(headline_label(run), []).append(run.name)
    return labels


def _notes(runs: Sequence[RunFindings]) -> dict[str, list[tuple[str, str]]]:
    """Section → the sentences on what is missing there, each once, with the runs that say it where it does not name them."""
    found: dict[str, dict[str, list[str]]] = {section.name: {} for section in _SECTIONS}
    for run in runs:
        for note in run.notes:
            said_by = found[note.section].setdefault(note.sentence, [])
            said_by += [] if run.name in note.sentence else [run.name]
    several = len(runs) > 1
    return {section: [(", ".join(names) if several else "", said) for said, names in notes.items()] for section, notes in found.items()}


def _settings(runs: Sequence[RunFindings]) -> dict[str, Table]:
    return {"all": settings_table(runs), "differing": settings_table(runs, only_differing=True)}


def _charts(figures: Mapping[str, Figure | Missing]) -> dict[str, dict[str, Any]]:
    """Element → Vega-Lite, and how a browser is to draw it."""
    charts = {}
    for figure in (each for each in figures.values() if isinstance(each, Figure)):
        for number, panel in enumerate(figure.panels):
            renderer = "canvas" if panel.num_marks > MOST_SVG_MARKS else "svg"
            # What the colours mean stands above the figure as text, where it wraps; a chart's own legend is cut off on a phone.
            charts[f"{figure.name}-{number}"] = {"spec": panel.page_spec(legend=not figure.legend), "renderer": renderer}
    return charts


def _cell(value: Any) -> str:
    """A cell's text: numbers with thousands apart, a dash for what is not known."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
