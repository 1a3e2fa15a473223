"""The classifier's rows: cosines of all pairs as a heat map."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import altair as alt

from bce3s.report.figures.figure import Cell, Figure, Missing, Panel
from bce3s.report.figures.parts import chart_of, sentences, signed
from bce3s.report.findings import CosineMap, RunFindings

_LARGEST_TABLE = 16
_LISTED_PAIRS = 30


def classifier_cosines(runs: Sequence[RunFindings]) -> Figure | Missing:
    """A heat map a run, classes from head to tail; all of one colour scale, whose middle is the simplex value."""
    name, title = "classifier-cosines", "Cosines of classifier rows"
    known = [(run, run.measured.cosine_map) for run in runs if run.measured and run.measured.cosine_map]
    if not known:
        return Missing(name=name, title=title, sentence="The cosines of the classifier's rows were not measured.")
    simplex = [-1.0 / (len(run.class_counts_K) - 1) for run, _ in known]
    cells = {run.name: _cells(run, found) for run, found in known}
    farthest = max((abs(cell["cosine"] - at) for at, of_run in zip(simplex, cells.values(), strict=True) for cell in of_run), default=0.0)
    reach = max(farthest, 0.05)
    blocks = any(len(members) > 1 for _, found in known for members in found.cell_classes)
    small = all(len(found.cells) <= _LARGEST_TABLE for _, found in known)
    return Figure(
        name=name,
        title=title,
        caption="Classes from head (top left) to tail."
        + (" A cell is the mean over the pairs of two blocks of classes." if blocks else " A class with itself is left out.")
        + f" The middle of the colours is the simplex value, {signed(simplex[0], 4)}: as far apart as all can be."
        + " Orange pairs point more alike than that, blue ones less.",
        findings=sentences(_map_finding(run, cells[run.name], len(known) > 1) for run, _ in known),
        panels=tuple(_map_panel(run, cells[run.name], at, reach, len(known) > 1) for (run, _), at in zip(known, simplex, strict=True)),
        head=("run", "class", "other class", "cosine"),
        rows=tuple(row for of_run in cells.items() for row in _pairs(*of_run, all_of_them=small)),
        columns=min(3, len(known)),
    )


def _cells(run: RunFindings, found: CosineMap) -> list[dict[str, Any]]:
    """One record a cell; a class with itself is no pair."""
    titles = [_cell_title(run, members) for members in found.cell_classes]
    return [
        {"i": i, "j": j, "cosine": round(value, 4), "class": titles[i], "other": titles[j]}
        for i, row in enumerate(found.cells)
        for j, value in enumerate(row)
        if i != j or len(found.cell_classes[i]) > 1
    ]


def _cell_title(run: RunFindings, members: tuple[int, ...]) -> str:
    name = run.class_names[members[0]] if run.class_names else f"class {members[0]}"
    if len(members) == 1:
        return name
    last = run.class_names[members[-1]] if run.class_names else f"class {members[-1]}"
    return f"{name} … {last} ({len(members)} classes)"


def _map_panel(run: RunFindings, cells: list[dict[str, Any]], simplex: float, reach: float, named: bool) -> Panel:
    size = 1 + max((cell["i"] for cell in cells), default=0)
    low, high = max(-1.0, simplex - reach), min(1.0, simplex + reach)
    legend = alt.Legend(title=None, orient="bottom", gradientLength=200, format=".2f", direction="horizontal")
    colour = alt.Color(
        "cosine:Q", legend=legend, scale=alt.Scale(domain=[low, high], domainMid=simplex, range="diverging", interpolate="rgb")
    )
    titles = {cell["i"]: str(cell["class"]) for cell in cells}
    scale = alt.Scale(domain=list(range(size)), paddingInner=0.0, paddingOuter=0.0)
    drawn = (
        _compact(cells, size, titles)
        .mark_rect(aria=False)
        .encode(
            x=alt.X("j:O", title=None, scale=scale, axis=_name_axis(titles, size, -45)),
            y=alt.Y("i:O", title=None, scale=scale, axis=_name_axis(titles, size, 0)),
            color=colour,
            tooltip=[alt.Tooltip("class:N"), alt.Tooltip("other:N", title="and"), alt.Tooltip("cosine:Q", format=".3f")],
        )
    )
    return Panel(title=run.name if named else "", chart=drawn, height_px=320, num_marks=len(cells), square=True)


def _compact(cells: list[dict[str, Any]], size: int, titles: dict[int, str]) -> alt.Chart:
    """The cells, put into the page as a record a row: names would be most of its size if every cell had its two."""
    rows = [[cell for cell in cells if cell["i"] == i] for i in range(size)]
    records = [{"i": i, "j": [cell["j"] for cell in row], "cosine": [cell["cosine"] for cell in row]} for i, row in enumerate(rows)]
    names = alt.InlineData(values=[{"i": i, "title": title} for i, title in titles.items()])
    chart = chart_of(records).transform_flatten(["j", "cosine"])
    for key, name in (("i", "class"), ("j", "other")):
        chart = chart.transform_lookup(lookup=key, from_=alt.LookupData(data=names, key="i", fields=["title"]), as_=[name])
    return chart


def _name_axis(titles: dict[int, str], size: int, angle: int) -> alt.Axis | None:
    """Names of the classes, where there is room for them. As literals of an expression: two classes may have one name."""
    if size > _LARGEST_TABLE:
        return None
    literals = json.dumps([titles.get(i, "") for i in range(size)])
    return alt.Axis(labelExpr=f"{literals}[datum.value]", labelAngle=angle, labelLimit=76, ticks=False, domain=False)


def _pairs(run: str, cells: list[dict[str, Any]], *, all_of_them: bool) -> list[tuple[Cell, ...]]:
    """Each pair once, the closest first; of many only those."""
    once = [cell for cell in cells if cell["i"] <= cell["j"]]
    ordered = sorted(once, key=lambda cell: -float(cell["cosine"]))
    return [(run, cell["class"], cell["other"], cell["cosine"]) for cell in (ordered if all_of_them else ordered[:_LISTED_PAIRS])]


def _map_finding(run: RunFindings, cells: list[dict[str, Any]], named: bool) -> str:
    if not cells:
        return ""
    closest = max(cells, key=lambda cell: float(cell["cosine"]))
    start = f"{run.name}: the" if named else "The"
    which = f"{closest['class']} and {closest['other']}" if closest["i"] != closest["j"] else f"within {closest['class']}"
    return f"{start} closest pair: {which}, cosine {signed(closest['cosine'], 2)}."
