"""The command `bce3s fast-train`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bce3s.command_line import names, options
from bce3s.command_line.names import completing
from bce3s.command_line.options import named

_FORMS = completing(("bce", "ce", "off"))
_EITHER = completing(("last", "best"))
_TRACKERS = completing(("none", "tensorboard", "wandb"))

_Dataset = Annotated[str, options.DATASET]
_Out = Annotated[Path | None, named("--out", more="; default runs/DATASET-LOSS-ARCH-sSEED")]
_METHOD_HELP = "Method: bce3s, or one to compare with: ce, bce, tsl, …"
_Method = Annotated[str | None, typer.Option("--method", "--loss", help=_METHOD_HELP, autocompletion=completing(names.method_names))]
_Joint = Annotated[str | None, typer.Option(help="Of --method tsl: the joint term as bce or ce.", autocompletion=_FORMS)]
_Contrastive = Annotated[str | None, typer.Option(help="Of --method tsl: the contrastive term as bce, ce or off.", autocompletion=_FORMS)]
_Uniform = Annotated[str | None, typer.Option(help="Of --method tsl: the uniform term as bce, ce or off.", autocompletion=_FORMS)]
_Epochs = Annotated[int | None, typer.Option(help="Epochs of the whole schedule; default the recipe's.")]
_Lr = Annotated[float | None, typer.Option(help="Peak learning rate; default the recipe's.")]
_Seed = Annotated[int | None, named("--seed", more=" of weights, order and augmentation")]
_Seeds = Annotated[str | None, named("--seeds", more=": 0,1,2; reports mean and standard deviation")]
_Deterministic = Annotated[bool, typer.Option("--deterministic", help="The same bits every time, also on CUDA; slower.")]
_Every = Annotated[str | None, typer.Option(help="How often to save: 500steps, 1epoch, 10m, 1h.")]
_Keep = Annotated[int | None, typer.Option(help="Checkpoints that stay.")]
_OnError = Annotated[str | None, options.ON_ERROR]
_Select = Annotated[
    str | None, typer.Option(help="Whose weights are the result: last, or the best on the val split.", autocompletion=_EITHER)
]
_Stages = Annotated[int, typer.Option(help="2 retrains the classifier after training (--set retrain.…).")]
_Resume = Annotated[bool, named("--resume", more="; starts a run if there is none")]
_Overwrite = Annotated[bool, named("--overwrite", more=": start the run anew")]
_Log = Annotated[str, typer.Option(help="Send the log to tensorboard or wandb as well, or to none.", autocompletion=_TRACKERS)]


def fast_train(
    dataset: _Dataset,
    shards: options.Shards = None,
    recipe: options.Recipe = None,
    out: _Out = None,
    method: _Method = None,
    joint: _Joint = None,
    contrastive: _Contrastive = None,
    uniform: _Uniform = None,
    arch: options.Arch = None,
    loader: options.Loader = None,
    epochs: _Epochs = None,
    batch_size: options.BatchSize = None,
    lr: _Lr = None,
    precision: options.Precision = None,
    device: options.DeviceOfConfig = None,
    seed: _Seed = None,
    seeds: _Seeds = None,
    deterministic: _Deterministic = False,
    checkpoint_every: _Every = None,
    keep: _Keep = None,
    on_error: _OnError = None,
    select: _Select = None,
    stages: _Stages = 1,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    settings: options.Settings = None,
    log: _Log = "none",
    print_config: options.PrintConfig = False,
    quiet: options.Quiet = False,
) -> None:
    """Train on shards, evaluate, and write the run to --out."""
    from bce3s.config import to_json
    from bce3s.throughput.command import resolve_config

    flags = {"loss.name": method, "model.arch": arch, "data.loader": loader, "data.batch_size": batch_size, "optimizer.learning_rate": lr}
    flags |= {"loss.joint": joint, "loss.contrastive": contrastive, "loss.uniform": uniform, "data.on_error": on_error, "select": select}
    flags |= {"epochs": epochs, "precision": precision, "device": device, "seed": seed}
    flags |= {"checkpoint.every": checkpoint_every, "checkpoint.keep": keep, "deterministic": deterministic or None}
    config = resolve_config(dataset, recipe, flags, settings or [])
    if print_config:
        typer.echo(to_json(config))
        return
    from bce3s.launch import Launch, launch
    from bce3s.seeds import parse_seeds
    from pipelines.config import require

    require(not seeds or seed is None, "--seeds names the seeds of all runs, so --seed says nothing beside it: give one of them")
    name = f"{dataset}-{config.loss.title}-{config.model.title}"
    asked = Launch(
        shards=shards or Path("shards") / dataset,
        out=out or Path("runs") / (name if seeds else f"{name}-s{config.seed}"),
        resume=resume,
        overwrite=overwrite,
        seeds=parse_seeds(seeds) if seeds else (),
        arguments=sys.argv[1:],
        stages=stages,
        quiet=quiet,
        tracker=log,
    )
    launch(config, asked)
