"""The command `bce3s retrain-classifier`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bce3s.command_line import options
from bce3s.command_line.names import completing
from bce3s.command_line.options import named

if TYPE_CHECKING:
    from bce3s.config import TrainConfig

_SETTABLE = ("retrain.", "data.")
_METHODS = completing(("bce", "crt", "lws", "tau-norm"))
_BATCH_NORM = typer.Option(help="frozen: features once; updated: as the reference, slow.", autocompletion=completing(("frozen", "updated")))
_LOG_HELP = "Send the log to tensorboard or wandb as well, or to none."
_SET_MORE = ": --set retrain.batch_size=128, of retrain.… and data.…"


def retrain_classifier(
    run: options.RunFolder,
    method: Annotated[str | None, typer.Option(help="Method: bce (the paper's), crt, lws or tau-norm.", autocompletion=_METHODS)] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the whole schedule; default the method's own.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default the method's own.")] = None,
    batch_norm: Annotated[str | None, _BATCH_NORM] = None,
    tau: Annotated[float | None, typer.Option(help="Of tau-norm: rows are divided by their length to this power.")] = None,
    max_norm: Annotated[float | None, typer.Option(help="Shorten long rows after every epoch; the reference's 0.1, 0 is off.")] = None,
    checkpoint: options.Checkpoint = None,
    shards: options.ShardsOfRun = None,
    device: options.Device = "auto",
    seed: Annotated[int | None, named("--seed", more=" of order and draws; default the run's")] = None,
    out: Annotated[Path | None, named("--out", more="; default RUN/stage2-METHOD")] = None,
    overwrite: Annotated[bool, named("--overwrite", more=": a stage two")] = False,
    settings: Annotated[list[str] | None, named("--set", more=_SET_MORE, metavar="PATH=VALUE")] = None,
    log: Annotated[str, typer.Option(help=_LOG_HELP, autocompletion=completing(("none", "tensorboard", "wandb")))] = "none",
    print_config: options.PrintConfig = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the classifier of a finished run anew, on the features of its frozen backbone."""
    from rich.console import Console

    from bce3s.config import to_json
    from bce3s.distributed import is_launched
    from bce3s.retrain.record import require_room
    from bce3s.retrain.report import print_stage_two
    from bce3s.retrain.stage_one import load_stage_one, stage_two_folder
    from bce3s.retrain.stage_two import StageTwo
    from bce3s.trackers import follow_finished, require_tracker
    from bce3s.train import Telling, shards_of, summary
    from pipelines.config import require
    from pipelines.format.bus_error import explain_bus_errors_of

    require(not is_launched(), "retrain-classifier runs in one process; start it without the launcher")
    require_tracker(log)
    opened = shards_of(run, shards)
    explain_bus_errors_of(opened.root)
    stage_one = load_stage_one(run, checkpoint, opened, device)
    flags = {"method": method, "epochs": epochs, "learning_rate": lr, "batch_norm": batch_norm, "tau": tau, "max_norm": max_norm}
    config = _configured(stage_one.config, flags, settings or [], seed)
    if print_config:
        typer.echo(to_json(config))
        return
    folder = out or stage_two_folder(run, config.retrain)
    require_room(folder, overwrite=overwrite)
    console = Console(stderr=json_output)
    for sentence in stage_one.skipped:
        typer.echo(f"warning: {sentence}; taking the one before", err=True)
    try:
        telling = Telling(quiet=quiet, tracker=log, command=shlex.join(["bce3s", *sys.argv[1:]]))
        stage_two = StageTwo(replace(stage_one, config=config), config.retrain, console, telling=telling)
        result = stage_two.run(folder)
        follow_finished(log, folder, lambda sentence: typer.echo(sentence, err=True))
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {folder} is as it was before", err=True)
        raise typer.Exit(130) from None
    if json_output:
        typer.echo(json.dumps({"out": str(folder), **summary(result)}, indent=1))
    else:
        print_stage_two(console, stage_two, result, folder)


def _configured(config: TrainConfig, flags: dict[str, Any], settings: list[str], seed: int | None) -> TrainConfig:
    """Stage one's settings with those of the command in their place; rate and weight decay of another method are not taken over."""
    from bce3s.config import override
    from pipelines.config import require

    for setting in settings:
        known = setting.strip().startswith(_SETTABLE)
        require(known, f"--set {setting} is not of stage two: it takes retrain.… and data.…, such as retrain.batch_size=128")
    given = [f"retrain.{name}={value}" for name, value in flags.items() if value is not None]
    given += settings + ([] if seed is None else [f"seed={seed}"])
    own = config.retrain.for_method(override(config, given).retrain.method)
    return override(replace(config, retrain=own), given)
