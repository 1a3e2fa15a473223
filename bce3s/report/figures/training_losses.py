"""Training over time: a panel for each term of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from bce3s.report.figures.figure import Chart, Figure, Missing, Panel
from bce3s.report.figures.parts import chart_of, coloured, epoch_axis, listed, names_of, rounded, run_tip, sentences
from bce3s.report.findings import RunFindings

_TERM_ORDER = ("total", "joint", "contrastive", "uniform")


def training_losses(runs: Sequence[RunFindings]) -> Figure | Missing:
    """Every term on its own axis: single steps thin, means of epochs thick, the least it can be dashed."""
    name, title = "training-losses", "Loss by term"
    known = [run for run in runs if run.steps or run.epochs]
    logged = [point.terms for run in known for point in run.steps] + [point.terms for run in known for point in run.epochs]
    terms = sorted({term for terms in logged for term in terms}, key=_term_position)
    if not terms:
        return Missing(name=name, title=title, sentence="The log has no line of training yet.")
    names = names_of(runs)
    floors = {term: {run.loss_floors[term] for run in known if term in run.loss_floors} for term in terms}
    return Figure(
        name=name,
        title=title,
        caption="Thin: steps; thick: means of epochs." + (" Dashed: the least that a term can be." if any(floors.values()) else ""),
        findings=sentences(_loss_finding(run, bool(names)) for run in known if run.epochs),
        panels=tuple(_term_panel(term, known, names, floors[term]) for term in terms),
        legend=names,
        head=("run", "epoch", *(term.replace("_", " ") for term in terms)),
        rows=tuple((run.name, point.epoch, *(rounded(point.terms.get(term)) for term in terms)) for run in known for point in run.epochs),
    )


def _term_position(term: str) -> tuple[int, str]:
    return (_TERM_ORDER.index(term) if term in _TERM_ORDER else len(_TERM_ORDER), term)


def _term_panel(term: str, runs: Sequence[RunFindings], names: tuple[str, ...], floors: set[float]) -> Panel:
    steps = [
        {"run": run.name, "epoch": round(p.epoch, 3), "value": rounded(p.terms[term])} for run in runs for p in run.steps if term in p.terms
    ]
    epochs = [{"run": run.name, "epoch": p.epoch, "value": rounded(p.terms[term])} for run in runs for p in run.epochs if term in p.terms]
    value = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    tooltip = [*run_tip(names), alt.Tooltip("epoch:Q"), alt.Tooltip("value:Q", title=term, format=".4g")]
    layers: list[Chart] = []
    if steps:
        thin = chart_of(steps).mark_line(strokeWidth=1, opacity=0.4, aria=False, tooltip=False)
        layers.append(thin.encode(x=epoch_axis(), y=value, **coloured("run", names)))
    if epochs:
        point = alt.OverlayMarkDef(size=30, filled=True)
        thick = chart_of(epochs).mark_line(strokeWidth=2, point=point, aria=False)
        layers.append(thick.encode(x=epoch_axis(), y=value, tooltip=tooltip, **coloured("run", names)))
    for floor in sorted(floors):
        rule = chart_of([{"value": floor}]).mark_rule(style="guide", aria=False)
        layers.append(rule.encode(y=value, tooltip=alt.Tooltip("value:Q", title="the least it can be", format=".4g")))
    return Panel(title=term.replace("_", " "), chart=alt.layer(*layers), height_px=190)


def _loss_finding(run: RunFindings, named: bool) -> str:
    last, words = run.epochs[-1], []
    for term in (each for each in _TERM_ORDER if each in last.terms):
        first = next(point for point in run.epochs if term in point.terms)  # a term may begin after a warm-up
        since = "" if first is run.epochs[0] else f" (epoch {first.epoch})"
        course = f"{term} from {first.terms[term]:.3g}{since} to {last.terms[term]:.3g}"
        words.append(course + _above_floor(run, term, last.terms[term]))
    if not words:
        return ""
    return f"{run.name + ', ' if named else ''}{'over' if named else 'Over'} {last.epoch} epochs: {listed(words)}."


def _above_floor(run: RunFindings, term: str, value: float) -> str:
    return f" (the least is {run.loss_floors[term]:.3g})" if term in run.loss_floors and value is not None else ""
