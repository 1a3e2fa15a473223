"""What a run's record says for the model card: accuracies by measurement, whose weights were exported, what it ran on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from bce3s.export.plain import Export
from bce3s.runlog import ENVIRONMENT_FILE, read_json, read_metrics
from bce3s.train import BEST_CHECKPOINT, Cursor

_LAST, _AVERAGE = "last_epoch_no_tta", "last_epoch_average_no_tta"
_TITLES = {
    _LAST: "last epoch",
    "last_epoch_flip_tta": "last epoch, flip test-time augmentation",
    _AVERAGE: "last epoch, average of weights",
}
_PACKAGES = ("torch", "nvidia-dali-cuda130", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """A run's record.

    Args:
        rows: label → accuracies in percent by group, and "ece"; the run's headline first; empty where the run has not ended.
        own: the label of these very weights; empty where none is.
        whose: one sentence on the weights.
        own_row: accuracies of these weights by group; empty where none is.
        per_class: accuracies in percent [K] of these weights; empty where they were not recorded.
        split: where they were measured.
        confidence: what the calibration error is of, "softmax" or "sigmoid"; empty where it was not measured.
        command: that trained; empty where it was not recorded.
        version, packages: that trained.
        precision, hardware: it ran in and on.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: str = ""
    own_row: dict[str, Any] = field(default_factory=dict)
    whose: str
    per_class: tuple[float | None, ...] = ()
    split: str = "test"
    confidence: str = ""
    command: str = ""
    version: str = ""
    packages: str = ""
    precision: str = ""
    hardware: str = ""


def figures_of(export: Export) -> RunFigures:
    """Of the run that a network was exported from; of a loose checkpoint, only whose weights they are."""
    trained = export.trained
    cursor = Cursor(**trained.state["cursor"])
    key = _own_measure(export)
    if trained.run is None:
        return RunFigures(whose=f"These are the weights of {cursor}.")
    summary: dict[str, Any] = next((line for line in reversed(read_metrics(trained.run)) if line["kind"] == "summary"), {})
    measures = {name: value for name, value in summary.items() if isinstance(value, dict) and "all" in value}
    key = next((name for name in measures if name.startswith(key)), "") if key else ""
    headline = summary.get("headline", _LAST)
    names = sorted(measures, key=lambda name: name != headline)
    own = measures.get(key, {})
    return RunFigures(
        rows={_title(name, measures[name]): measures[name] for name in names},
        own=_title(key, own) if own else "",
        own_row=own,
        whose=f"These are the weights of the {_title(key, own)}." if own else f"These are the weights of {cursor}.",
        per_class=tuple(own.get("per_class") or ()),
        split=summary.get("split", "test"),
        confidence=((own or measures.get(headline, {})).get("calibration") or {}).get("confidence", ""),
        **_circumstances(read_json(environment) if (environment := trained.run / ENVIRONMENT_FILE).is_file() else {}),
    )


def _own_measure(export: Export) -> str:
    """How the name of the measurement of these weights starts; empty where no summary has it."""
    if export.average:
        return _AVERAGE
    if export.trained.path.name == BEST_CHECKPOINT:
        return "best_on_"
    cursor, config = Cursor(**export.trained.state["cursor"]), export.trained.config
    epochs = config.retrain.epochs if export.retrained_with else config.epochs
    ended = cursor.epoch >= epochs or export.retrained_with == "tau-norm"
    return _LAST if ended else ""


def _title(name: str, row: dict[str, Any]) -> str:
    if name.startswith("best_on_"):
        return f"best epoch on {name.removeprefix('best_on_').removesuffix('_no_tta')} ({row['epoch'] + 1})"
    return _TITLES.get(name, name.replace("_", " "))


def _circumstances(recorded: dict[str, Any]) -> dict[str, str]:
    versions = recorded.get("versions", {})
    cores = f"{recorded['cpu_cores']} CPU cores" if recorded.get("cpu_cores") else ""
    command = recorded.get("command", "")
    return {
        "version": str(versions.get("bce3s", "")),
        "packages": ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions),
        "precision": str(recorded.get("precision", "")),
        "hardware": recorded.get("gpu") or cores,
        "command": shlex.join(command) if isinstance(command, list) else str(command),
    }
