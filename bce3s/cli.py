"""The command line: `bce3s fast-train`, `evaluate` and `profile`. Torch is imported only once a command runs, so `--help` is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from bce3s.throughput.command import profile, resolve_config
from pipelines.datasets import DATASETS, shot_groups
from pipelines.types import ConfigError, ShardError, UserError

if TYPE_CHECKING:
    from bce3s.config import TrainConfig
    from bce3s.train import RunResult, Trainer

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
    loss: Annotated[str | None, typer.Option(help="bce3s, bce or ce.")] = None,
    arch: Annotated[str | None, typer.Option(help="Backbone, such as resnet32-cifar or resnet50.")] = None,
    loader: Annotated[str | None, typer.Option(help="auto, resident, dali, ffcv, webdataset, cached or synthetic.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the whole schedule.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Source images a step; three views each.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and augmentation.")] = None,
    on_error: Annotated[str | None, typer.Option(help="A sample that does not decode any more: stop, or skip it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out; starts it if there is none.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where --out holds a run.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set optimizer.weight_decay=1e-4.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved settings as JSON and stop.")] = False,
) -> None:
    """Train on shards, evaluate, and write the run to --out."""
    from bce3s.config import to_json

    flags = {"loss.name": loss, "model.arch": arch, "data.loader": loader, "data.batch_size": batch_size, "optimizer.learning_rate": lr}
    flags |= {"data.on_error": on_error}
    flags |= {"epochs": epochs, "precision": precision, "device": device, "seed": seed}
    config = resolve_config(dataset, recipe, {path: value for path, value in flags.items() if value is not None}, settings or [])
    if print_config:
        typer.echo(to_json(config))
        return
    folder = out or Path("runs") / f"{dataset}-{config.loss.name}-{config.model.arch}-s{config.seed}"
    _train(config, shards or Path("shards") / dataset, folder, resume=resume, overwrite=overwrite)


def _train(config: TrainConfig, shards: Path | str, out: Path, *, resume: bool, overwrite: bool) -> None:
    from dataclasses import replace

    from bce3s.train import LAST_CHECKPOINT, Trainer, saved_loader
    from pipelines.config import require_choice
    from pipelines.format import open_shards
    from pipelines.format.bus_error import explain_bus_errors_of
    from pipelines.loaders import LOADERS, MADE_UP_PIXELS

    require_choice("loader", config.data.loader, ("auto", *LOADERS))
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite starts it anew: give one of them")
    console = Console()
    has_run = (out / LAST_CHECKPOINT).exists()
    if has_run and not (resume or overwrite):
        raise ConfigError(f"{out} holds a run already; add --resume to continue it, --overwrite to start anew, or choose another --out")
    if has_run and resume and config.data.loader == "auto":
        config = replace(config, data=replace(config.data, loader=saved_loader(out)))
    opened = open_shards(shards)
    explain_bus_errors_of(opened.root)
    trainer = Trainer(config, opened, out, console)
    try:
        done = trainer.resume() if has_run and resume else 0
        placement, choice = trainer.placement, trainer.loader_choice
        console.print(
            f"{config.loss.name} with {config.model.arch} on {config.dataset} ({int(trainer.train_counts_K.sum()):,} training images, "
            f"{len(trainer.train_counts_K)} classes); loader {choice.name} ({'as before' if done else choice.reason}); "
            f"{placement.device}, {placement.precision}" + (f"; continuing after epoch {done}" if done else ""),
            highlight=False,
            soft_wrap=True,
        )
        if choice.name in MADE_UP_PIXELS:
            console.print(
                f"loader '{choice.name}' is for measuring: its pixels are not those of the labels, so accuracies mean nothing",
                soft_wrap=True,
            )
        result = trainer.fit()
    except KeyboardInterrupt:
        console.print(
            f"interrupted after epoch {trainer.state.epochs_done}: the same command with --resume continues there", soft_wrap=True
        )
        raise typer.Exit(130) from None
    finally:
        trainer.close()
    _print_result(console, trainer, result)


def _print_result(console: Console, trainer: Trainer, result: RunResult) -> None:
    from bce3s.progress import accuracy_table

    rows = {
        "last epoch": result.last,
        "last epoch, flip TTA": result.last_flip_tta,
        f"best epoch on {result.selection_split} ({result.best_epoch + 1})": result.best,
    }
    sizes = {name: int(members.sum()) for name, members in shot_groups(trainer.train_counts_K).items()}
    caption = f"{sizes['many']} many-, {sizes['medium']} medium-, {sizes['few']} few-shot classes; {result.last.num_images:,} images"
    console.print(accuracy_table(f"{result.report_split} split", rows, caption))
    console.print(f"{result.images_per_s:.0f} source images/s in training, data wait {result.data_wait_share:.0%}", highlight=False)
    console.print(f"run: {trainer.out}   evaluate again: bce3s evaluate {trainer.out}", highlight=False, soft_wrap=True)


app.command("profile")(profile)


@app.command("evaluate")
def evaluate_run(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    shards: Annotated[str | None, typer.Option(help="Shard folder or URL; default what the run was trained on.")] = None,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    checkpoint: Annotated[str, typer.Option(help="last or best.")] = "last",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, per class too.")] = False,
) -> None:
    """Evaluate a trained run, with and without flip test-time augmentation."""
    import json
    from dataclasses import replace

    import numpy as np

    from bce3s.checkpoint import load_checkpoint, require_same_data
    from bce3s.device import resolve_device
    from bce3s.evaluate import evaluate
    from bce3s.progress import accuracy_table
    from bce3s.runlog import ENVIRONMENT_FILE, read_json
    from bce3s.train import load_run
    from pipelines.config import require_choice
    from pipelines.format import open_shards
    from pipelines.format.bus_error import explain_bus_errors_of
    from pipelines.loaders import MADE_UP_PIXELS, build_loader
    from pipelines.store import is_remote

    require_choice("split", split, ("val", "test"))
    require_choice("checkpoint", checkpoint, ("last", "best"))
    path = run / f"{checkpoint}.pt"
    recorded = read_json(run / ENVIRONMENT_FILE)
    state = load_checkpoint(path, resolve_device(device))
    location = shards or recorded["shards"]
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
        figures = evaluate(model, data, counts_K, augment, placement, flip_tta=True, on_step=lambda: progress.advance(task))
    data.close()
    rows = {f"{checkpoint} epoch ({state['epochs_done']})": figures["plain"], f"{checkpoint} epoch, flip TTA": figures["flip_tta"]}
    if json_output:
        typer.echo(json.dumps({name: accuracy.to_dict() for name, accuracy in rows.items()}, indent=1))
    else:
        console.print(accuracy_table(f"{run}, {split} split", rows, f"{figures['plain'].num_images:,} images"))


def run_app(application: typer.Typer) -> None:
    """Runs a command line; a `UserError` becomes one sentence on standard error and exit status 2."""
    try:
        application()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def main() -> None:
    """Entry point of the `bce3s` command."""
    run_app(app)


if __name__ == "__main__":
    main()
