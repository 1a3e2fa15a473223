"""What finished runs say: their figures by measure and shot group, and what they cost."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bce3s.reproduce.grid import STAGE_TWO
from bce3s.reproduce.runs import Run, read_record
from bce3s.runlog import ENVIRONMENT_FILE, read_json, read_metrics
from bce3s.seeds import GROUPS, summary_of

Figures = dict[str, dict[str, float | None]]  # measure -> shot group -> top-1 in percent, None where the group is empty


def figures_of(run: Run) -> Figures:
    """All measures of a finished run by shot group; those of stage two with `STAGE_TWO` before their names."""
    found = _measures(run.out)
    if run.stages == 2:
        found |= {STAGE_TWO + name: groups for name, groups in _measures(run.stage_two).items()}
    return found


def _measures(folder: Path) -> Figures:
    summary = summary_of(folder)
    measured = {name: value for name, value in summary.items() if isinstance(value, dict) and all(group in value for group in GROUPS)}
    evaluated = [line for line in read_metrics(folder) if line["kind"] == "epoch" and "all" in line]
    if len(evaluated) == 1:  # at the end alone: the best epoch is the last one by name only
        measured = {name: value for name, value in measured.items() if not name.startswith("best_on_")}
    return {name: {group: value[group] for group in GROUPS} for name, value in measured.items()}


def cost_of(run: Run) -> dict[str, float | None]:
    """Of a finished run.

    Returns:
        train_s: seconds of training in stage one, without evaluation. wall_s: seconds from start to end, all stages and evaluations
        included; None where something stopped it in between. images_per_s: source images in training, the median over epochs.
    """
    epochs = [line for line in read_metrics(run.out) if line["kind"] == "epoch"]
    return {
        "train_s": sum(line["train_s"] for line in epochs),
        "wall_s": read_record(run).get("wall_s"),
        "images_per_s": summary_of(run.out)["images_per_s"],
    }


def mean_cost(costs: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Means over those runs that know; None where none does."""
    known = {name: [cost[name] for cost in costs] for name in ("train_s", "wall_s", "images_per_s")}
    filled = {name: [value for value in values if value is not None] for name, values in known.items()}
    return {name: statistics.fmean(values) if values else None for name, values in filled.items()}


def environment_of(run: Run) -> dict[str, Any]:
    """What the run says it ran on: hardware, threads, precision, versions and commits."""
    recorded, noted = read_json(run.out / ENVIRONMENT_FILE), read_record(run)
    hardware = noted.get("hardware", {})
    versions = {name: version for name, version in recorded["versions"].items() if version != "not installed"}
    return {
        "device": recorded["gpu"] or f"CPU ({hardware.get('cpu', 'unknown')})",
        "cores": recorded["cpu_cores"],
        "threads": recorded["torch_threads"],
        "precision": recorded["precision"],
        "python": recorded["python"],
        "versions": versions,
        "commits": noted.get("commits", []),
    }


def measure_title(measure: str) -> str:
    """'last epoch, no TTA' of 'last_epoch_no_tta', 'stage two, last epoch, flip TTA' of 'stage2:last_epoch_flip_tta'."""
    name = measure.removeprefix(STAGE_TWO)
    title = name.replace("_no_tta", ", no TTA").replace("_flip_tta", ", flip TTA").replace("_average", ", average of weights")
    return ("stage two, " if measure.startswith(STAGE_TWO) else "") + title.replace("_", " ")
