"""The command line: `bce3s fast-train`, `evaluate` and `profile`. Torch is imported only once a command runs, so `--help` is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from bce3s.throughput.command import profile, resolve_config
from pipelines.datasets import DATASETS
from pipelines.types import ConfigError, ShardError, UserError

if TYPE_CHECKING:
    from bce3s.train import Cursor

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Train long-tailed image recognisers, fast."
)


@app.callback()
def _root() -> None:
    """Train long-tailed image recognisers, fast."""


@app.command("fast-train")
def fast_train(
    dataset: Annotated[str, typer.Option(help=f"Data set the shards were made from: {', '.join(DATASETS)}.")],
    shards: Annotated[str | None, typer.Option(help="Shard folder, or URL to stream from; default shards/DATASET.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe to start from; default that of the data set.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/DATASET-LOSS-ARCH-sSEED.")] = None,
    method: Annotated[str | None, typer.Option("--method", "--loss", help="bce3s, or a method to compare with: ce, bce, tsl, …")] = None,
    joint: Annotated[str | None, typer.Option(help="Of --method tsl: the joint term as bce or ce.")] = None,
    contrastive: Annotated[str | None, typer.Option(help="Of --method tsl: the contrastive term as bce, ce or off.")] = None,
    uniform: Annotated[str | None, typer.Option(help="Of --method tsl: the uniform term as bce, ce or off.")] = None,
    arch: Annotated[str | None, typer.Option(help="Backbone, such as resnet32-cifar or resnet50.")] = None,
    loader: Annotated[str | None, typer.Option(help="auto, resident, dali, ffcv, webdataset, cached or synthetic.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the whole schedule.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Source images a step; three views each.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and augmentation.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several runs, one a seed: 0,1,2; reports mean and standard deviation.")] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits every time, also on CUDA; slower.")] = False,
    checkpoint_every: Annotated[str | None, typer.Option(help="How often to save: 500steps, 1epoch, 10m, 1h.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints that stay.")] = None,
    on_error: Annotated[str | None, typer.Option(help="A sample that does not decode any more: stop, or skip it.")] = None,
    select: Annotated[str | None, typer.Option(help="Whose weights are the result: last, or the best on the val split.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out; starts it if there is none.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where --out holds a run.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set optimizer.weight_decay=1e-4.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved settings as JSON and stop.")] = False,
) -> None:
    """Train on shards, evaluate, and write the run to --out."""
    from bce3s.config import to_json
    from bce3s.launch import Launch, launch
    from bce3s.seeds import parse_seeds

    flags = {"loss.name": method, "model.arch": arch, "data.loader": loader, "data.batch_size": batch_size, "optimizer.learning_rate": lr}
    flags |= {"loss.joint": joint, "loss.contrastive": contrastive, "loss.uniform": uniform, "data.on_error": on_error, "select": select}
    flags |= {"epochs": epochs, "precision": precision, "device": device, "seed": seed}
    flags |= {"checkpoint.every": checkpoint_every, "checkpoint.keep": keep, "deterministic": deterministic or None}
    config = resolve_config(dataset, recipe, {path: value for path, value in flags.items() if value is not None}, settings or [])
    if print_config:
        typer.echo(to_json(config))
        return
    if seeds and seed is not None:
        raise ConfigError("--seeds names the seeds of all runs, so --seed says nothing beside it: give one of them")
    name = f"{dataset}-{config.loss.name}-{config.model.arch}"
    asked = Launch(
        shards=shards or Path("shards") / dataset,
        out=out or Path("runs") / (name if seeds else f"{name}-s{config.seed}"),
        resume=resume,
        overwrite=overwrite,
        seeds=parse_seeds(seeds) if seeds else (),
        arguments=sys.argv[1:],
    )
    launch(config, asked)


app.command("profile")(profile)


@app.command("evaluate")
def evaluate_run(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    shards: Annotated[str | None, typer.Option(help="Shard folder or URL; default what the run was trained on.")] = None,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    checkpoint: Annotated[str, typer.Option(help="last or best.")] = "last",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    average: Annotated[bool, typer.Option("--average", help="The moving average of the weights, where the run kept one.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, per class too.")] = False,
) -> None:
    """Evaluate a trained run, with and without flip test-time augmentation."""
    import json
    from contextlib import nullcontext
    from dataclasses import replace

    import numpy as np
    import torch

    from bce3s.checkpoint import load_checkpoint, require_same_data
    from bce3s.device import resolve_device
    from bce3s.evaluate import evaluate
    from bce3s.progress import accuracy_table
    from bce3s.runlog import ENVIRONMENT_FILE, read_json
    from bce3s.train import BEST_CHECKPOINT, Cursor, average_applied, load_last, load_run
    from pipelines.config import require_choice
    from pipelines.format import open_shards
    from pipelines.format.bus_error import explain_bus_errors_of
    from pipelines.loaders import MADE_UP_PIXELS, build_loader
    from pipelines.store import is_remote

    require_choice("split", split, ("val", "test"))
    require_choice("checkpoint", checkpoint, ("last", "best"))
    recorded = read_json(run / ENVIRONMENT_FILE)
    resolve_device(device)  # before a large file is read
    if checkpoint == "last":
        loaded = load_last(run)
        state, path = loaded.state, loaded.path
        for sentence in loaded.skipped:
            typer.echo(f"warning: {sentence}; taking the one before", err=True)
    else:
        path = run / BEST_CHECKPOINT
        state = load_checkpoint(path, torch.device("cpu"))
    location = shards or str(recorded.get("shards", ""))
    if shards is None and not is_remote(location) and not Path(location).is_dir():
        raise ShardError(f"the shards of {run} are not at {location} any more; name where they are with --shards")
    opened = open_shards(location)
    require_same_data(state, path, opened.dataset, opened.fingerprint, opened.root)
    config, placement, model = load_run(state, device)
    # What a run was trained from a folder with cannot stream, or has no pixels of the images; "auto" finds what does.
    other = not isinstance(opened.root, Path) or config.data.loader in MADE_UP_PIXELS
    data_config = replace(config.data, loader="auto") if other else config.data
    explain_bus_errors_of(opened.root)
    data = build_loader(opened, split, data_config, seed=config.seed, device=placement.device)
    console = Console(stderr=json_output)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"evaluating {split}", total=data.num_steps)
        counts_K, augment = np.array(state["train_counts"]), config.data.augment
        with average_applied(state, model, config, path) if average else nullcontext():
            figures = evaluate(model, data, counts_K, augment, placement, flip_tta=True, on_step=lambda: progress.advance(task))
    data.close()
    name = _measured(checkpoint, Cursor(**state["cursor"])) + (", average of weights" if average else "")
    rows = {name: figures["plain"], f"{name}, flip TTA": figures["flip_tta"]}
    if json_output:
        typer.echo(json.dumps({name: accuracy.to_dict() for name, accuracy in rows.items()}, indent=1))
    else:
        console.print(accuracy_table(f"{run}, {split} split", rows, f"{figures['plain'].num_images:,} images"))


def _measured(checkpoint: str, cursor: Cursor) -> str:
    """'last epoch (3)', 'best epoch (2)', or of a run that is not at an epoch's end 'last checkpoint (step 12 of epoch 4)'."""
    if checkpoint == "best":
        return f"best epoch ({cursor.best_epoch + 1})"
    return f"last checkpoint ({cursor})" if cursor.step else f"last epoch ({cursor.epoch})"


def run_app(application: typer.Typer) -> None:
    """Runs a command line; a `UserError` becomes one sentence on standard error and exit status 2."""
    try:
        application()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `bce3s` command, and of a process that is to behave as if it had been given `arguments`."""
    if arguments is not None:
        sys.argv[1:] = arguments
    run_app(app)


if __name__ == "__main__":
    main()
