"""The command `bce3s profile`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bce3s.command_line import options
from bce3s.command_line.options import named

if TYPE_CHECKING:
    from bce3s.config import TrainConfig

MIN_REPEATS = 5
QUICK_SECONDS = 0.02

_Repeats = Annotated[int, typer.Option(help="Samples of every row, 5 or more.")]
_Seconds = Annotated[float, typer.Option(help="Length of a sample at least; a step that takes longer is a sample.")]
_Quick = Annotated[bool, typer.Option("--quick", help="Samples as short as can be: shows that everything runs.")]
_Compiled = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Measure torch.compile; default on a GPU.")]
_Json = Annotated[bool, named("--json", more=": every sample, or with --compare every change")]
_JsonOut = Annotated[Path | None, typer.Option(help="Write that JSON to a file.")]
_Plot = Annotated[Path | None, typer.Option(help="Draw a bar chart, .png or .svg.")]
_Trace = Annotated[Path | None, typer.Option(help="Write a Chrome trace of ten steps, .json.")]
_Compare = Annotated[tuple[Path, Path] | None, typer.Option(help="Measure nothing: look for regressions between two files.")]
_Threshold = Annotated[float, typer.Option(help="What --compare takes for a change, as a share.")]


def profile(
    dataset: options.Dataset = None,
    shards: options.Shards = None,
    recipe: options.Recipe = None,
    loader: options.Loader = None,
    arch: options.Arch = None,
    batch_size: options.BatchSize = None,
    precision: options.Precision = None,
    device: options.DeviceOfConfig = None,
    settings: options.Settings = None,
    print_config: options.PrintConfig = False,
    repeats: _Repeats = MIN_REPEATS,
    seconds: _Seconds = 1.0,
    quick: _Quick = False,
    compiled: _Compiled = None,
    json_output: _Json = False,
    json_out: _JsonOut = None,
    plot: _Plot = None,
    trace: _Trace = None,
    compare: _Compare = None,
    threshold: _Threshold = 0.05,
    quiet: options.Quiet = False,
    json_file: Annotated[Path | None, typer.Argument(hidden=True)] = None,  # of `--json FILE`, as it was before --json was a flag
) -> None:
    """Measure every stage from disk to gradients, alone and together, and say what binds.

    For the row of a cold page cache the shards' pages are dropped from it.

    With --compare BEFORE.json AFTER.json the exit status is 1 if a row became slower, or one that the run needs was lost.
    """
    from bce3s.config import to_json
    from pipelines.config import require

    require(json_file is None or json_output, f"'{json_file}' belongs to no option; --json-out {json_file} writes JSON there")
    require(json_file is None or json_out is None, "--json FILE means --json-out FILE: give one of them")
    files = {"json_out": json_file or json_out, "plot": plot, "trace": trace}
    flags = {"data.loader": loader, "model.arch": arch, "data.batch_size": batch_size, "precision": precision, "device": device}
    if compare is None:
        require(dataset is not None, "--dataset is missing; name the data set to measure with, or two profiles with --compare")
        require(repeats >= MIN_REPEATS, f"--repeats must be at least {MIN_REPEATS}, not {repeats}")
        require(0 < seconds < 3600, f"--seconds must lie between 0 and 3600, not {seconds}")
        config = resolve_config(dataset or "", recipe, flags, settings or [])
        if print_config:
            typer.echo(to_json(config))
            return
    from bce3s.throughput.session import Outputs, compare_profiles, run_profile
    from bce3s.throughput.timing import Budget
    from pipelines.format import open_shards

    outputs = Outputs(json=json_output and json_file is None, quiet=quiet, **files)
    outputs.require_writable()
    if compare is not None:
        raise typer.Exit(int(compare_profiles(*compare, threshold, outputs)))
    try:
        opened = open_shards(shards or Path("shards") / (dataset or ""))
        run_profile(config, opened, Budget(repeats=repeats, seconds=QUICK_SECONDS if quick else seconds), compiled, outputs)
    except KeyboardInterrupt:
        typer.echo("interrupted: a file that was not finished is as it was before", err=True)
        raise typer.Exit(130) from None


def resolve_config(dataset: str, recipe: str | None, flags: Mapping[str, Any], settings: list[str]) -> TrainConfig:
    """A recipe, by default that of the data set, with `flags` (path of a setting → value) and then "path=value" `settings` in their place.

    Args:
        flags: those that are None leave the recipe's value.

    Raises:
        ConfigError: an unknown data set, recipe or setting, or a value it does not take.
    """
    from bce3s.config import override
    from bce3s.losses import resolve_method
    from bce3s.recipes import build_recipe
    from pipelines.config import require_choice
    from pipelines.datasets import DATASETS

    require_choice("dataset", dataset, tuple(DATASETS))
    given = [f"{path}={value}" for path, value in flags.items() if value is not None]
    return resolve_method(override(build_recipe(recipe, dataset), given + settings))
