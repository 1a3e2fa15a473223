"""Everything that a report shows, from run folders to `Findings`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bce3s.device import resolve_device
from bce3s.report.findings import Findings, SeedsFinding
from bce3s.report.one_run import MEASURED, findings_of
from bce3s.report.opened import Asked, OpenedRun
from bce3s.report.places import run_folders, short_names
from bce3s.seeds import combine, is_finished, summary_of
from pipelines.format import open_shards
from pipelines.types import UserError

__all__ = ["MEASURED", "Asked", "read_findings"]


def read_findings(places: Sequence[Path], asked: Asked | None = None) -> Findings:
    """The findings of runs; what of a run cannot be shown becomes a note of it, not an error.

    Args:
        places: run folders, also of stages two and of runs that have not ended, and seeds folders.
        asked: what to measure, with what; None measures all, each with its own shards.

    Raises:
        UserError: a place holds no run, or its record is damaged; the shards or the device that were asked for cannot be had.
    """
    asked = asked or Asked()
    folders, of_seeds = run_folders(places)
    if asked.model:
        resolve_device(asked.device)  # before minutes of measuring
    given = None if asked.shards is None else open_shards(asked.shards)
    names = dict(zip(folders, short_names(folders), strict=True))
    runs = tuple(findings_of(OpenedRun(folder, names[folder], asked, given)) for folder in folders)
    seeds = [_seeds(place, members, names) for place, members in of_seeds.items()]
    return Findings(runs=runs, seeds=tuple(seeds))


def _seeds(place: Path, members: list[Path], names: dict[Path, str]) -> SeedsFinding:
    finished = {int(run.name[1:]): summary_of(run) for run in members if is_finished(run)}
    runs = tuple(names[run] for run in members)
    try:
        figures = combine(finished) if finished else {}
        sentence = _mean_sentence(figures, len(members)) if finished else "None of its runs has ended."
    except UserError as error:
        figures, sentence = {}, f"No mean over the seeds: {error}."
    return SeedsFinding(folder=place, runs=runs, figures=figures, sentence=sentence)


def _mean_sentence(figures: dict[str, Any], num_runs: int) -> str:
    """Such as 'all 43.53 ± 0.42, many …, few n/a: mean ± sample standard deviation over n = 3 seeds, top-1 accuracy in %.'."""
    spreads = figures["figures"][figures["headline"]]
    n, parts = figures["n"], []
    for group in ("all", "many", "medium", "few"):
        spread = spreads[group]
        shown = "n/a" if spread is None else f"{spread['mean']:.2f}" + ("" if spread["sd"] is None else f" ± {spread['sd']:.2f}")
        parts.append(f"{group} {shown}")
    rest = f" ({num_runs - n} of {num_runs} runs have not ended)" if n < num_runs else ""
    spread_over = f"mean ± sample standard deviation over n = {n} seeds" if n > 1 else "one seed"
    return f"{', '.join(parts)}: {spread_over}, top-1 accuracy in %{rest}."
