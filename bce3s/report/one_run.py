"""The findings of one run."""

from __future__ import annotations

from typing import Any

from bce3s.config import LossConfig, from_dict
from bce3s.metrics import Calibration
from bce3s.report.findings import MEASURES, Measured, RunFindings
from bce3s.report.log_points import epoch_points, step_points
from bce3s.report.opened import OpenedRun
from bce3s.report.training_command import command_of
from bce3s.seeds import LAST
from pipelines.types import UserError

MEASURED = "measured_no_tta"
"""Label of the measurement of a run that has no summary."""
_ACRONYMS = ("bce3s", "bce", "ce", "glmc", "bcl", "ldam-drw")

Measurements = dict[str, dict[str, Any]]


def findings_of(run: OpenedRun) -> RunFindings:
    """Measures the run and puts together what is known of it; on the rest there are notes."""
    measured = run.measure()
    headline, measurements = _measurements(run.summary, measured)
    result = measurements.get(headline, {})
    _say_if_unfinished(run, measured)
    _say_if_other_figures(run, measured, result)
    class_names, counts_K = _classes(run)
    images_a_step = run.config.get("data", {}).get("batch_size", 1) * run.environment.get("world_size", 1)
    return RunFindings(
        name=run.name,
        folder=run.folder,
        complete=bool(run.summary),
        **_identity(run.config, run.environment),
        split=str(run.summary.get("split") or (measured.split if measured else "")),
        headline=headline,
        selected_by=run.summary.get("selected_by"),
        measurements={label: {name: value.get(name) for name in MEASURES} for label, value in measurements.items()},
        measurement_epochs={label: value["epoch"] + 1 for label, value in measurements.items() if "epoch" in value},
        num_images=result.get("num_images"),
        class_names=class_names,
        class_counts_K=counts_K,
        imbalance_factor=max(counts_K) / min(filter(None, counts_K)) if any(counts_K) else None,
        per_class_K=tuple(result.get("per_class", ())),
        calibration=_calibration(run, measured, result),
        features=_features(run, measured),
        steps=step_points(run.lines, images_a_step, sum(counts_K)),
        epochs=epoch_points(run.lines),
        loss_floors=run.environment.get("loss_floors", {}),
        config=run.config,
        environment=run.environment,
        command=_command(run),
        measured=measured,
        notes=tuple(run.notes),
    )


def _measurements(summary: dict[str, Any], measured: Measured | None) -> tuple[str, Measurements]:
    """Which is the result, and all of them with it first."""
    found = {label: value for label, value in summary.items() if isinstance(value, dict) and set(MEASURES[:4]) <= value.keys()}
    if summary:
        headline = str(summary.get("headline", LAST))
        return headline, dict(sorted(found.items(), key=lambda item: item[0] != headline))
    if measured is not None and measured.accuracy is not None:
        return MEASURED, {MEASURED: measured.accuracy.to_dict()}
    return "", {}


def _identity(config: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    loss, stage = config.get("loss", {}), int(environment.get("stage", 1))
    method, arch, dataset = str(loss.get("name", "")), str(config.get("model", {}).get("arch", "")), str(config.get("dataset", ""))
    retrained_with = str(config.get("retrain", {}).get("method", "")) if stage == 2 else ""
    try:
        shown = from_dict(LossConfig, loss).title
    except UserError:  # of another version
        shown = method
    shown = shown.upper() if shown in _ACRONYMS else shown
    title = f"{shown}, {arch}, {dataset}" + (f", stage two ({retrained_with})" if retrained_with else "")
    facts = {"title": title, "dataset": dataset, "method": method, "arch": arch}
    return {**facts, "retrained_with": retrained_with, "stage": stage, "seed": int(config.get("seed", 0))}


def _say_if_unfinished(run: OpenedRun, measured: Measured | None) -> None:
    if run.summary:
        return
    done = sum(line["kind"] == "epoch" for line in run.lines)
    broken = next((line for line in reversed(run.lines) if line["kind"] == "broken"), None)
    cause = f"its loss was not finite from step {broken['step'] + 1} of epoch {broken['epoch'] + 1} on" if broken else ""
    if not cause and run.lines and run.lines[-1]["kind"] == "stopped":
        cause = str(run.lines[-1].get("reason", "")).rstrip(".")
    standing = f"; its figures are of its {measured.checkpoint}" if measured is not None and measured.accuracy is not None else ""
    ended = f"{cause or 'it is still training or was stopped'}{standing}"
    run.note("headline", f"{run.name} has no result yet, {done} of {run.config.get('epochs')} epochs done: {ended}.")


def _say_if_other_figures(run: OpenedRun, measured: Measured | None, result: dict[str, Any]) -> None:
    """The same weights on the same images: other kernels, another precision or version may decide close calls otherwise."""
    if run.asked.checkpoint or measured is None or measured.accuracy is None or result.get("all") is None:
        return
    found, said = measured.accuracy.all, result["all"]
    if found is not None and abs(found - said) >= 0.005:
        run.note("headline", f"{run.name}: measured for this report, all is {found:.2f} %; its own summary says {said:.2f} %.")


def _classes(run: OpenedRun) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if run.shards is not None:
        return run.shards.class_names, tuple(run.shards.class_counts("train").tolist())
    if run.network is not None:
        return run.network.class_names, tuple(run.network.class_counts_K.tolist())
    run.note("classes", f"Names and sizes of the classes are not known: neither the shards nor a checkpoint of {run.name} are there.")
    return (), ()


def _calibration(run: OpenedRun, measured: Measured | None, result: dict[str, Any]) -> Calibration | None:
    if measured is not None and measured.accuracy is not None:
        return measured.accuracy.calibration
    recorded = result.get("calibration")
    if recorded is None:
        run.note("calibration", "Calibration was not recorded, and it was not measured.")
        return None
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}
    return Calibration(**lists)


def _features(run: OpenedRun, measured: Measured | None) -> dict[str, Any] | None:
    if measured is not None and measured.geometry is not None:
        return {"split": measured.split, **measured.geometry.figures()}
    recorded: dict[str, Any] | None = run.summary.get("last_epoch_features")
    if recorded is None:
        run.note("features", "The geometry of the features was not recorded, and it was not measured.")
    return recorded


def _command(run: OpenedRun) -> str:
    command, recorded = command_of(run.folder, run.config, run.environment)
    if not recorded:
        missing = "the one shown has the same settings" if command else "its settings are those of another version"
        run.note("settings", f"The command was not recorded; {missing}.")
    return command
