"""A table and the runs on disk put together: everything that TABLE.json says."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bce3s import __version__
from bce3s.reproduce.claims import judge
from bce3s.reproduce.figures import Figures, cost_of, environment_of, figures_of, mean_cost
from bce3s.reproduce.grid import Row, Table
from bce3s.reproduce.runs import Run, is_of_table, plan_run, seeds_on_disk
from bce3s.seeds import GROUPS, combine


def collect(
    table: Table, out: Path, shards: dict[str, Path | str], seeds: Sequence[int], device: str, command: Sequence[str]
) -> dict[str, Any]:
    """The state of a table: what is published, what was measured and with how many seeds, what is missing.

    Args:
        table: whose rows; all of them, also those that this command does not train.
        out: where their runs are.
        shards: `ShardsOf.name` -> where they are.
        seeds: asked for; others that are on disk count too.
        device: asked for.
        command: arguments of `bce3s` that were given.
    """
    measured = {row.name: _measured(table, row, out, shards, seeds) for row in table.rows if row.shards is not None}
    finished = {run.name: run for runs in measured.values() for run, _ in runs.values()}
    environments: list[dict[str, Any]] = []
    for run in finished.values():
        found = environment_of(run)
        if found not in environments:
            environments.append(found)
    return {
        "table": table.name,
        "title": table.title,
        "budget": table.budget.name,
        "version": __version__,
        "device_asked": device,
        "command": shlex.join(["bce3s", *command]),
        "notes": [*table.budget.notes, *table.notes],
        "rows": [_row(table, row, measured.get(row.name, {}), seeds, out, shards) for row in table.rows],
        "claims": [_claim(table, number, measured) for number in range(len(table.claims))],
        "environments": environments,
        "num_runs_finished": len(finished),
    }


Measured = dict[int, tuple[Run, Figures]]  # seed -> finished run and its figures


def _measured(table: Table, row: Row, out: Path, shards: dict[str, Path | str], seeds: Sequence[int]) -> Measured:
    runs = {seed: plan_run(table.budget, row, seed, shards, out) for seed in sorted({*seeds, *seeds_on_disk(out, row)})}
    return {seed: (run, figures_of(run)) for seed, run in runs.items() if run.finished and is_of_table(run)}


def _row(table: Table, row: Row, measured: Measured, seeds: Sequence[int], out: Path, shards: dict[str, Path | str]) -> dict[str, Any]:
    figures = {seed: found for seed, (_, found) in measured.items()}
    combined = combine(figures) if figures else {"figures": {}}
    published = None if row.published is None else {"label": row.published.label, **row.published.groups()}
    entry = {"name": row.name, "title": row.title, "published": published, "trained": row.shards is not None, "headline": row.headline}
    if row.shards is None:
        return entry
    run = plan_run(table.budget, row, min(seeds), shards, out)
    return {
        **entry,
        "shards": row.shards.name,
        "runs": row.run_name,
        "settings": list(row.settings),
        "command": shlex.join(["bce3s", *run.command()]),
        "seeds": sorted(figures),
        "missing_seeds": [seed for seed in seeds if seed not in figures],
        "n": len(figures),
        "figures": combined["figures"],
        "by_seed": {str(seed): found for seed, found in figures.items()},
        "cost": mean_cost([cost_of(run) for run, _ in measured.values()]),
    }


def _claim(table: Table, number: int, measured: dict[str, Measured]) -> dict[str, Any]:
    claim = table.claims[number]
    values, empty = [], False
    for name in (claim.better, claim.worse):
        headline = table.row(name).headline
        found = {seed: figures[headline][claim.group] for seed, (_, figures) in measured[name].items() if headline in figures}
        empty = empty or any(value is None for value in found.values())
        values.append({seed: value for seed, value in found.items() if value is not None})
    assert claim.group in GROUPS, f"a claim names a shot group, not {claim.group}"
    titles = {"better_title": table.row(claim.better).title, "worse_title": table.row(claim.worse).title}
    said = {"better": claim.better, "worse": claim.worse, **titles, "group": claim.group}
    return {**said, "published_difference": table.published_difference(claim), "empty": empty, **judge(values[0], values[1])}
