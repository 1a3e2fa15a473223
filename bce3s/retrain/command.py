"""The command `bce3s retrain-classifier`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipelines.config import require
from pipelines.types import ConfigError

if TYPE_CHECKING:
    from bce3s.config import TrainConfig

_SETTABLE = ("retrain.", "data.")


def retrain_classifier(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    method: Annotated[str | None, typer.Option(help="bce (the paper's), crt, lws or tau-norm.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Over the training images.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default the method's own.")] = None,
    batch_norm: Annotated[str | None, typer.Option(help="frozen: features once; updated: as the reference, slow.")] = None,
    tau: Annotated[float | None, typer.Option(help="Of tau-norm: rows are divided by their length to this power.")] = None,
    max_norm: Annotated[float | None, typer.Option(help="Shorten long rows after every epoch; the reference's 0.1, 0 is off.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="last, or best: on val, or on test where there is no val; default the run's result.")
    ] = None,
    shards: Annotated[str | None, typer.Option(help="Shard folder or URL; default what the run was trained on.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Of order and draws; default the run's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result; default RUN/stage2-METHOD.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a stage two that --out holds.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting: --set retrain.batch_size=128.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, per class too.")] = False,
) -> None:
    """Train the classifier of a finished run anew, on the features of its frozen backbone."""
    from bce3s.distributed import is_launched
    from bce3s.retrain.record import require_room
    from bce3s.retrain.report import print_stage_two
    from bce3s.retrain.stage_one import load_stage_one, stage_two_folder
    from bce3s.retrain.stage_two import StageTwo
    from bce3s.train import shards_of, summary
    from pipelines.format.bus_error import explain_bus_errors_of

    if is_launched():
        raise ConfigError("retrain-classifier runs in one process; start it without the launcher")
    opened = shards_of(run, shards)
    explain_bus_errors_of(opened.root)
    stage_one = load_stage_one(run, checkpoint, opened, device)
    flags = {"method": method, "epochs": epochs, "learning_rate": lr, "batch_norm": batch_norm, "tau": tau, "max_norm": max_norm}
    config = _configured(stage_one.config, flags, settings or [], seed)
    folder = out or stage_two_folder(run, config.retrain)
    require_room(folder, overwrite=overwrite)
    console = Console(stderr=json_output)
    for sentence in stage_one.skipped:
        typer.echo(f"warning: {sentence}; taking the one before", err=True)
    try:
        stage_two = StageTwo(replace(stage_one, config=config), config.retrain, console)
        result = stage_two.run(folder)
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

    for setting in settings:
        known = setting.strip().startswith(_SETTABLE)
        require(known, f"--set {setting} is not of stage two: it takes retrain.… and data.…, such as retrain.batch_size=128")
    given = [f"retrain.{name}={value}" for name, value in flags.items() if value is not None]
    given += settings + ([] if seed is None else [f"seed={seed}"])
    own = config.retrain.for_method(override(config, given).retrain.method)
    return override(replace(config, retrain=own), given)
