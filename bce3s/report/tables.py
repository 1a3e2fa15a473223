"""Tables of a report: results, geometry by shot group, settings and environment of runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bce3s.config import by_path
from bce3s.metrics import format_percent
from bce3s.report.figures import Figure
from bce3s.report.findings import RunFindings
from bce3s.reproduce.figures import measure_title

_GROUPS = ("all", "many", "medium", "few")
_MISSING = "–"


@dataclass(frozen=True)
class Row:
    """Cells of a row; the first is its head. `strong` is what the page is about."""

    cells: tuple[Any, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table with named columns. `caption` is for whoever cannot see where it stands."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    numeric: bool = True


def headline_label(run: RunFindings) -> str:
    """How a run's result was measured: 'last epoch, no TTA, test split, 10,000 images'."""
    if not run.headline:
        return "not evaluated yet"
    parts = [measurement_label(run, run.headline)]
    parts += [f"selected by {run.selected_by}"] if run.selected_by else []
    parts += [f"{run.split} split"] if run.split else []
    parts += [f"{run.num_images:,} images"] if run.num_images else []
    return ", ".join(parts)


def measurement_label(run: RunFindings, label: str) -> str:
    """'best on val, no TTA (epoch 7)'."""
    if label == "measured_no_tta":
        return f"{run.measured.checkpoint if run.measured else 'measured'}, no TTA"
    epoch = run.measurement_epochs.get(label)
    return measure_title(label) + (f" (epoch {epoch})" if epoch else "")


def headline_table(runs: Sequence[RunFindings]) -> Table:
    """Every measurement of every run; each run's result before what stands beside it."""
    rows = []
    for run in runs:
        for label, figures in run.measurements.items():
            shown = [format_percent(figures[group]) for group in (*_GROUPS, "balanced")]
            ece = _MISSING if figures["ece"] is None else format_percent(figures["ece"])
            rows.append(Row((run.name, measurement_label(run, label), *shown, ece), strong=label == run.headline))
        if not run.measurements:
            rows.append(Row((run.name, "not evaluated yet", *[_MISSING] * 6)))
    head = ("run", "measured", *_GROUPS, "balanced", "ECE")
    return Table("Top-1 accuracy and expected calibration error, in percent", head, tuple(rows))


def feature_table(runs: Sequence[RunFindings]) -> Table | None:
    """Geometry by shot group and neural collapse; None where no run has it."""
    known = [(run, run.features) for run in runs if run.features]
    rows: list[Row] = []
    for run, figures in known:
        for name, title in (("compactness", "compactness"), ("separability", "separability"), ("nearest", "nearest class")):
            spreads = figures.get(name) or {}
            rows.append(Row((run.name, title, *(_spread(spreads.get(group)) for group in _GROUPS))))
        for name, title in (
            ("nc1", "NC1: within / between classes"),
            ("nc2_equiangular_means", "NC2: |cosine + 1/(K−1)| of means"),
            ("nc2_equiangular_rows", "NC2: the same of rows"),
            ("nc3", "NC3: rows less class means"),
        ):
            value = (figures.get("collapse") or {}).get(name)
            rows.append(Row((run.name, title, _MISSING if value is None else f"{value:.4g}", "", "", "")))
    return (
        Table("Geometry of the features by shot group: mean ± standard deviation over classes", ("run", "measure", *_GROUPS), tuple(rows))
        if rows
        else None
    )


def _spread(found: dict[str, Any] | None) -> str:
    if not found or found.get("mean") is None:
        return "n/a"
    return f"{found['mean']:.3f}" + (f" ± {found['std']:.3f}" if found.get("std") is not None else "")


def settings_table(runs: Sequence[RunFindings], *, only_differing: bool = False) -> Table:
    """Settings by their full names, a column a run; those that all share can be left out."""
    return _side_by_side(
        "Settings that differ" if only_differing else "All settings", runs, [by_path(run.config) for run in runs], only_differing
    )


def environment_table(runs: Sequence[RunFindings]) -> Table:
    """What the runs ran on."""
    return _side_by_side("Environment", runs, [by_path(run.environment) for run in runs], only_differing=False)


def _side_by_side(caption: str, runs: Sequence[RunFindings], values: Sequence[dict[str, Any]], only_differing: bool) -> Table:
    names = dict.fromkeys(name for each in values for name in each)
    rows = [(name, *(_written(each, name) for each in values)) for name in names]
    shown = [Row(row) for row in rows if not only_differing or len(set(row[1:])) > 1]
    return Table(caption, ("setting", *(run.name for run in runs)), tuple(shown), numeric=False)


def _written(values: dict[str, Any], name: str) -> str:
    """As `--set` would take it."""
    if name not in values:
        return _MISSING
    value = values[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figure_table(figure: Figure) -> Table:
    """A figure's numbers."""
    return Table(f"Numbers of the figure: {figure.title}", figure.head, tuple(Row(row) for row in figure.rows))
