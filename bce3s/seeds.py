"""Several seeds of one config: mean and standard deviation, with n, as honest figures are reported."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from bce3s.runlog import read_metrics
from pipelines.durable import write_atomically
from pipelines.types import ConfigError

SEEDS_FILE = "seeds.json"
GROUPS = ("all", "many", "medium", "few")
MORE_FIGURES = ("balanced", "ece")  # of the file, not of the table
LAST = "last_epoch_no_tta"


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers.

    Raises:
        ConfigError: not numbers, or one twice.
    """
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--seeds takes whole numbers, such as 0,1,2, not '{text}'") from None
    if min(seeds) < 0:
        raise ConfigError(f"--seeds takes numbers from 0 on, not '{text}'")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text} names a seed twice; equal seeds give equal runs")
    return seeds


def is_finished(run: Path) -> bool:
    """Whether the log of a run ends with its summary."""
    lines = read_metrics(run)
    return bool(lines) and lines[-1]["kind"] == "summary"


def summary_of(run: Path) -> dict[str, Any]:
    """The summary of a finished run."""
    assert is_finished(run), "only a run that ended well is summed up"
    return read_metrics(run)[-1]


def combine(summaries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds of every figure of their summaries; None where a group is empty.

    Those of accuracies are under "figures" by measure, the "headline" first, and group, those of features under "features" by path. A
    spread over fewer seeds than "n" has its own "n"; measures that some seeds do not have are named under "left_out".

    Args:
        summaries: seed -> summary line, of at least one run.

    Raises:
        ConfigError: the seeds' headlines are not the same measure, or not selected alike.
    """
    headline, selected_by = _headline(summaries)
    found = dict.fromkeys(name for summary in summaries.values() for name, value in summary.items() if _is_accuracy(value))
    left_out = [name for name in found if not all(name in summary for summary in summaries.values())]
    measures = sorted((name for name in found if name not in left_out), key=lambda name: name != headline)
    figures = {measure: _spreads([summary[measure] for summary in summaries.values()], (*GROUPS, *MORE_FIGURES)) for measure in measures}
    flat = [dict(_scalars(summary.get("last_epoch_features") or {})) for summary in summaries.values()]
    features = _spreads(flat, tuple(dict.fromkeys(name for each in flat for name in each)))
    return {
        **{"seeds": sorted(summaries), "n": len(summaries), "headline": headline, "selected_by": selected_by},
        **{"figures": figures, "features": features, "left_out": left_out},
    }


def _headline(summaries: dict[int, dict[str, Any]]) -> tuple[str, str | None]:
    """The measure that is the result of every seed, and what its epoch was selected by; summaries that do not say are of last epochs."""
    (first, expected), *others = ((seed, (each.get("headline", LAST), each.get("selected_by"))) for seed, each in summaries.items())
    for seed, found in others:
        if found != expected:
            raise ConfigError(
                f"seed {first}'s result is {_described(*expected)}, seed {seed}'s is {_described(*found)}, and a mean of both is neither: "
                "give the same command with --resume --select last, or train anew with --overwrite"
            )
    return expected


def _described(headline: str, selected_by: str | None) -> str:
    return f"{headline} by {selected_by}" if selected_by else headline


def _is_accuracy(value: Any) -> bool:
    return isinstance(value, dict) and set(GROUPS) <= value.keys()


def _scalars(figures: dict[str, Any], path: str = "") -> Iterator[tuple[str, float | None]]:
    """Every number of nested figures under its path, such as "compactness.few.mean"."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{path}{name}.")
        elif value is None or isinstance(value, (int, float)):
            yield f"{path}{name}", value


def _spreads(found: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, dict[str, float | None] | None]:
    """Those of `names` that some of `found` have."""
    return {name: _spread([each.get(name) for each in found]) for name in names if any(name in each for each in found)}


def _spread(values: list[float | None]) -> dict[str, float | None] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = {"mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}
    return spread if len(known) == len(values) else {**spread, "n": len(known)}


def write_seeds(folder: Path, combined: dict[str, Any]) -> None:
    """Keeps the figures beside the runs."""
    write_atomically(folder / SEEDS_FILE, json.dumps(combined, indent=1).encode())


def seeds_table(combined: dict[str, Any]) -> Table:
    """Mean ± standard deviation by shot group, one row a measure; the first is the headline."""
    seeds = ", ".join(map(str, combined["seeds"]))
    caption = f"mean ± sample standard deviation, n = {combined['n']} (seeds {seeds})"
    if combined["left_out"]:
        caption += f"; not of every seed and left out: {', '.join(map(_title, combined['left_out']))}"
    table = Table(title=f"{combined['n']} seeds", caption=caption, title_justify="left", caption_justify="left")
    table.add_column("top-1 accuracy, %")
    for group in GROUPS:
        table.add_column(group, justify="right")
    for number, (measure, groups) in enumerate(combined["figures"].items()):
        cells = [_cell(groups[group]) for group in GROUPS]
        table.add_row(
            _title(measure),
            *cells,
            style="bold" if number == 0 else None,
        )
    return table


def _title(measure: str) -> str:
    return measure.replace("_", " ").replace("no tta", "no TTA").replace("flip tta", "flip TTA")


def _cell(spread: dict[str, float | None] | None) -> str:
    if spread is None:
        return "n/a"
    shown = f"{spread['mean']:.2f}" if spread["sd"] is None else f"{spread['mean']:.2f} ± {spread['sd']:.2f}"
    return f"{shown} (n = {spread['n']})" if "n" in spread else shown
