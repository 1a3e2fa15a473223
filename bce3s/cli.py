"""The command line: fast-train, retrain-classifier, evaluate, reproduce and profile.

Torch is imported only once a command runs, so `--help` is instant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bce3s.doctor.command import doctor
from bce3s.evaluate.command import evaluate_run
from bce3s.export.command import export
from bce3s.predict.command import predict
from bce3s.report.command import report
from bce3s.reproduce.command import reproduce
from bce3s.retrain.command import retrain_classifier
from bce3s.throughput.command import profile, resolve_config
from bce3s.watch.command import watch
from pipelines.datasets import DATASETS
from pipelines.types import ConfigError, UserError

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
    batch_size: Annotated[int | None, typer.Option(help="Source images a step; three views each (of bcl two).")] = None,
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
    stages: Annotated[int, typer.Option(help="2 retrains the classifier after training (--set retrain.…).")] = 1,
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
    name = f"{dataset}-{config.loss.title}-{config.model.arch}"
    asked = Launch(
        shards=shards or Path("shards") / dataset,
        out=out or Path("runs") / (name if seeds else f"{name}-s{config.seed}"),
        resume=resume,
        overwrite=overwrite,
        seeds=parse_seeds(seeds) if seeds else (),
        arguments=sys.argv[1:],
        stages=stages,
    )
    launch(config, asked)


app.command("profile")(profile)
app.command("reproduce")(reproduce)
app.command("evaluate")(evaluate_run)
app.command("retrain-classifier")(retrain_classifier)
app.command("report")(report)
app.command("watch")(watch)
app.command("predict")(predict)
app.command("export")(export)
app.command("doctor")(doctor)


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
