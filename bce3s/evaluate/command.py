"""The command `bce3s evaluate`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bce3s.command_line import options

if TYPE_CHECKING:
    from rich.console import Console

    from bce3s.metrics import Accuracy, FeatureGeometry
    from pipelines.format import ShardSet


def evaluate_run(
    run: options.RunFolder,
    shards: options.ShardsOfRun = None,
    split: options.Split = "test",
    checkpoint: options.Checkpoint = None,
    device: options.Device = "auto",
    average: Annotated[bool, typer.Option("--average", help="The moving average of the weights, where the run kept one.")] = False,
    features: Annotated[bool, typer.Option("--features", help="Compactness, separability and neural collapse too.")] = False,
    adjust_logits: Annotated[float | None, typer.Option(help="τ: beside it, logits less τ times the log of the class priors.")] = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Evaluate a trained run, with and without flip test-time augmentation."""
    from rich.console import Console

    from pipelines.config import require, require_choice
    from pipelines.types import SPLITS

    require_choice("split", split, SPLITS)
    require_choice("checkpoint", checkpoint or "last", ("last", "best"))
    tau = adjust_logits or 0.0
    require(0 <= tau < math.inf, f"--adjust-logits takes a τ from 0 on, such as 1, not {tau}")
    from bce3s.checkpoint import require_same_data
    from bce3s.device import resolve_device
    from bce3s.evaluate.table import geometry_tables
    from bce3s.progress import accuracy_table
    from bce3s.runlog import ENVIRONMENT_FILE, read_json
    from bce3s.train import checkpoint_of_result, load_trained, moment_of, retrained_with, shards_of
    from pipelines.format.bus_error import explain_bus_errors_of

    read_json(run / ENVIRONMENT_FILE)  # or one sentence: it is no run
    resolve_device(device)  # before a large file is read
    checkpoint = checkpoint or ("last" if average else checkpoint_of_result(run))  # no best checkpoint keeps an average
    loaded = load_trained(run, checkpoint)
    state, path = loaded.state, loaded.path
    for sentence in loaded.skipped:
        typer.echo(f"warning: {sentence}; taking the one before", err=True)
    opened = shards_of(run, shards)
    require_same_data(state, path, opened.dataset, opened.fingerprint, opened.root)
    explain_bus_errors_of(opened.root)
    console = Console(stderr=json_output)
    method = retrained_with(state, run)
    name = f"stage two ({method}), " if method else ""
    name += moment_of(state, path, opened) + (", average of weights" if average else "")
    measuring = _Measuring(split, average, features, tau, method)
    figures, geometry = _measure(opened, measuring, state, path, device, None if quiet else console)
    adjusted = f"adjusted τ={tau:g}"
    labels = {"plain": name, "plain_adjusted": f"{name}, {adjusted}"}
    labels |= {"flip_tta": f"{name}, flip TTA", "flip_tta_adjusted": f"{name}, flip TTA, {adjusted}"}
    rows = {label: figures[key] for key, label in labels.items() if key in figures}
    if json_output:
        found: dict[str, Any] = {label: accuracy.to_dict() for label, accuracy in rows.items()}
        typer.echo(json.dumps(found | ({"features": {"split": split, **geometry.to_dict()}} if geometry else {}), indent=1))
        return
    caption = f"{figures['plain'].num_images:,} images" + (", without augmentation" if split == "train" else "")
    caption += "; adjusted: logits less τ·log of the class priors" if tau else ""
    console.print(accuracy_table(f"{run}, {split} split", rows, caption))
    if geometry:
        console.print(geometry_tables(f"{name}: features of the {split} split, and classifier", geometry))


class _Measuring(NamedTuple):
    """What is to be measured."""

    split: str
    average: bool
    features: bool
    tau: float
    retrained_with: str


def _measure(
    shards: ShardSet, asked: _Measuring, state: dict[str, Any], path: Path, device: str, console: Console | None
) -> tuple[dict[str, Accuracy], FeatureGeometry | None]:
    """One pass over the split, under a bar where there is somebody to see it."""
    import numpy as np
    from rich.progress import Progress

    from bce3s.evaluate.split import classifier_rows, evaluate
    from bce3s.metrics import FeatureStatistics, confidence_kind
    from bce3s.progress import is_live
    from bce3s.train import average_applied, load_run, with_loader_for
    from pipelines.loaders import build_loader

    config, placement, model = load_run(state, device)
    config = with_loader_for(config, shards)
    data = build_loader(shards, asked.split, config.data, seed=config.seed, device=placement.device, training=False)
    statistics = FeatureStatistics(len(state["class_names"]), model.backbone.feature_dim, placement.device) if asked.features else None
    with Progress(console=console, transient=True, disable=console is None or not is_live(console)) as progress:
        task = progress.add_task(f"evaluating {asked.split}", total=data.num_steps)
        counts_K, augment = np.array(state["train_counts"]), config.data.augment
        with average_applied(state, model, config, path) if asked.average else nullcontext():
            figures = evaluate(
                *(model, data, counts_K, augment, placement),
                flip_tta=True,
                on_step=lambda: progress.advance(task),
                confidence=confidence_kind(config.loss, asked.retrained_with),
                adjust_logits=asked.tau,
                features=statistics,
            )
            geometry = statistics.geometry(classifier_rows(model.classifier), counts_K) if statistics else None
    data.close()
    return figures, geometry
