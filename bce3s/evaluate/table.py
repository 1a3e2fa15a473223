"""The tables of what features and classifier look like."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from bce3s.metrics import FeatureGeometry

_GROUPS = ("all", "many", "medium", "few")


def geometry_tables(title: str, geometry: FeatureGeometry) -> Group:
    """Figures of single classes by shot group, and figures of all classes together."""
    by_group = Table(title=title, title_justify="left", caption_justify="left")
    by_group.caption = f"{geometry.num_images:,} images of {geometry.num_classes:,} classes; mean ± standard deviation over classes"
    by_group.add_column("cosines")
    for group in _GROUPS:
        by_group.add_column(group, justify="right")
    for name, spreads in (
        ("compactness", geometry.compactness),
        ("separability", geometry.separability),
        ("nearest class", geometry.nearest),
    ):
        by_group.add_row(name, *(_cell(spreads[group].mean, spreads[group].std) for group in _GROUPS))
    return Group(by_group, _together(geometry))


def _together(geometry: FeatureGeometry) -> Table:
    table = Table(caption="mean ± standard deviation over pairs; NC: neural collapse, 0 once complete, class means centred")
    table.caption_justify = "left"
    for name in ("all classes together", "class means", "classifier rows"):
        table.add_column(name, justify="left" if name.startswith("all") else "right")
    pairs, collapse = (geometry.class_means, geometry.classifier), geometry.collapse
    table.add_row("cosine of a pair", *(_cell(found.mean, found.std) if found else "n/a" for found in pairs))
    table.add_row("closest pair", *(_cell(found.max) if found else "n/a" for found in pairs))
    table.add_row("rms distance to −1/(K−1)", *(_cell(found.rms_to_simplex) if found else "n/a" for found in pairs))
    table.add_section()
    table.add_row("NC1: within / between classes", _cell(collapse.nc1), "")
    table.add_row("NC2: lengths, std / mean", _cell(collapse.nc2_equinorm_means), _cell(collapse.nc2_equinorm_rows))
    table.add_row("NC2: |cosine + 1/(K−1)|", _cell(collapse.nc2_equiangular_means), _cell(collapse.nc2_equiangular_rows))
    table.add_row("NC3: rows less class means", "", _cell(collapse.nc3))
    return table


def _cell(value: float | None, std: float | None = None) -> str:
    if value is None:
        return "n/a"
    shown = f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
    return shown if std is None else f"{shown} ± {std:.4f}"
