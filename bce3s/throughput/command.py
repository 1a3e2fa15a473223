"""The command `bce3s profile`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations

from contextlib import nullcontext
from os import getloadavg
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipelines.config import require, require_choice
from pipelines.datasets import DATASETS
from pipelines.format import ShardSet, open_shards
from pipelines.types import ConfigError, UserError

if TYPE_CHECKING:
    from bce3s.config import TrainConfig
    from bce3s.throughput.record import Findings
    from bce3s.throughput.timing import Budget
    from bce3s.throughput.workload import Workload

MIN_REPEATS = 5
QUICK_SECONDS = 0.02
BUSY = 0.25  # load average per core from which rates suffer


def profile(
    dataset: Annotated[str | None, typer.Option(help=f"Data set the shards were made from: {', '.join(DATASETS)}.")] = None,
    shards: Annotated[str | None, typer.Option(help="Shard folder, or URL to stream from; default shards/DATASET.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe to start from; default that of the data set.")] = None,
    loader: Annotated[str | None, typer.Option(help="Loader to measure; default the recipe's.")] = None,
    arch: Annotated[str | None, typer.Option(help="Backbone, such as resnet32-cifar or resnet50.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Source images a step; three views each.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set data.num_threads=8.")] = None,
    repeats: Annotated[int, typer.Option(help="Samples of every row, 5 or more.")] = MIN_REPEATS,
    seconds: Annotated[float, typer.Option(help="Length of a sample at least; a step that takes longer is a sample.")] = 1.0,
    quick: Annotated[bool, typer.Option("--quick", help="Samples as short as can be: shows that everything runs.")] = False,
    compiled: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Measure torch.compile; default on a GPU.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every sample here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a bar chart, .png or .svg.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of ten steps, .json.")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="Measure nothing: look for regressions between two files.")] = None,
    threshold: Annotated[float, typer.Option(help="What --compare takes for a change, as a share.")] = 0.05,
) -> None:
    """Measure every stage from disk to gradients, alone and together, and say what binds.

    For the row of a cold page cache the shards' pages are dropped from it.

    With --compare BEFORE.json AFTER.json the exit status is 1 if a row became slower, or one that the run needs was lost.
    """
    if compare is not None:
        _compare(*compare, threshold)
        return
    if dataset is None:
        raise ConfigError("--dataset is missing; name the data set to measure with, or two profiles with --compare")
    require(repeats >= MIN_REPEATS, f"--repeats must be at least {MIN_REPEATS}, not {repeats}")
    require(0 < seconds < 3600, f"--seconds must lie between 0 and 3600, not {seconds}")
    flags = {"data.loader": loader, "model.arch": arch, "data.batch_size": batch_size, "precision": precision, "device": device}
    config = resolve_config(dataset, recipe, {path: value for path, value in flags.items() if value is not None}, settings or [])
    outputs = {"json": json_file, "plot": plot, "trace": trace}
    _require_writable(outputs)
    try:
        _profile(config, open_shards(shards or Path("shards") / dataset), repeats, QUICK_SECONDS if quick else seconds, compiled, outputs)
    except KeyboardInterrupt:
        typer.echo("interrupted: a file that was not finished is as it was before", err=True)
        raise typer.Exit(130) from None


def resolve_config(dataset: str, recipe: str | None, flags: dict[str, Any], settings: list[str]) -> TrainConfig:
    """A recipe, by default that of the data set, with `flags` (path of a setting → value) and then "path=value" `settings` in their place.

    Raises:
        ConfigError: an unknown data set, recipe or setting, or a value it does not take.
    """
    from bce3s.config import override
    from bce3s.losses import resolve_method
    from bce3s.recipes import build_recipe

    require_choice("dataset", dataset, tuple(DATASETS))
    return resolve_method(override(build_recipe(recipe, dataset), [f"{path}={value}" for path, value in flags.items()] + settings))


def _require_writable(outputs: dict[str, Path | None]) -> None:
    """What would stop the writing after minutes of measuring stops the command now."""
    from bce3s.throughput.chart import require_chart

    for option, path in outputs.items():
        if path is not None:
            require(path.absolute().parent.is_dir(), f"--{option} {path} lies in a folder that does not exist; make it first")
            require(not path.is_dir(), f"--{option} {path} is a folder; name a file")
            try:
                # Tried, not asked: a read-only file system and a full quota say yes to whoever asks.
                with NamedTemporaryFile(dir=path.absolute().parent, prefix=".bce3s-profile-"):
                    pass
            except OSError as error:
                raise ConfigError(f"--{option} {path} cannot be written there ({error.strerror or error}); name another file") from error
    if outputs["plot"] is not None:
        require_chart(outputs["plot"])


def _profile(
    config: TrainConfig, shards: ShardSet, repeats: int, seconds: float, compiled: bool | None, outputs: dict[str, Path | None]
) -> None:
    from bce3s.throughput.advice import advise, verdict_sentences
    from bce3s.throughput.profile import measure
    from bce3s.throughput.record import Findings
    from bce3s.throughput.timing import Budget
    from bce3s.throughput.verdict import judge
    from bce3s.throughput.workload import Workload
    from pipelines.format.bus_error import explain_bus_errors_of

    console = Console()
    load_average, budget = getloadavg()[0], Budget(repeats=repeats, seconds=seconds)
    workload = Workload(config, shards)
    explain_bus_errors_of(workload.shards.root)
    compiled = workload.device.type == "cuda" if compiled is None else compiled
    with console.status("") if console.is_terminal else nullcontext() as status:

        def say(stage: str) -> None:
            if status is not None:
                status.update(f"measuring: {stage}")
            else:
                typer.echo(f"measuring: {stage}", err=True)

        measured = measure(workload, budget, compiled=compiled, say=say)
    verdict = judge(measured.facts, measured.rows)
    advice = None if verdict is None else advise(measured.facts, measured.rows, verdict)
    sentences = (
        ["No verdict: the loader or the step could not be measured."]
        if verdict is None or advice is None
        else verdict_sentences(measured.facts, measured.rows, verdict, advice)
    )
    if load_average > BUSY * measured.facts.num_cores:
        sentences.append(
            f"Warning: other programs were running (load average {load_average:.1f} before the start): measure again without them."
        )
    findings = Findings(profile=measured, verdict=verdict, advice=advice, sentences=sentences, load_average=load_average)
    _show(console, workload, budget, findings)
    _write(console, workload, budget, findings, outputs)


def _show(console: Console, workload: Workload, budget: Budget, findings: Findings) -> None:
    from bce3s.throughput.table import print_sentences, rows_table

    binding = None if findings.verdict is None else findings.verdict.binding
    print_sentences(console, [_title(workload)])
    console.print(rows_table(findings.profile.rows, binding, budget.repeats))
    print_sentences(console, [f"Page cache: {findings.profile.page_cache}.", *findings.sentences])


def _title(workload: Workload) -> str:
    config, placement = workload.config, workload.placement
    return (
        f"{config.dataset}, {config.model.arch}, {config.data.image_size} px, batch {config.data.batch_size}, "
        f"loader {workload.choice.name} ({workload.choice.reason}), {placement.device}, {placement.precision}"
    )


def _write(console: Console, workload: Workload, budget: Budget, findings: Findings, outputs: dict[str, Path | None]) -> None:
    from bce3s.throughput.chart import draw_chart
    from bce3s.throughput.record import profile_record, to_bytes
    from bce3s.throughput.trace import write_trace
    from pipelines.durable import write_atomically

    json_file, plot, trace = outputs["json"], outputs["plot"], outputs["trace"]
    path = json_file
    try:
        if json_file is not None:
            write_atomically(json_file, to_bytes(profile_record(workload, budget, findings)))
        path = plot
        if plot is not None:
            write_atomically(plot, draw_chart(findings.profile.rows, findings.verdict, _title(workload), plot.suffix))
        path = trace
        if trace is not None:
            write_trace(workload, trace)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another file") from error
    for written in (json_file, plot, trace):
        if written is not None:
            console.print(f"wrote {written}", highlight=False, soft_wrap=True)


def _compare(before: Path, after: Path, threshold: float) -> None:
    from bce3s.throughput.compare import changes_table, compare_rows, differences, lost_rows, needed_rows, read_profile
    from bce3s.throughput.table import print_sentences

    require(0 <= threshold < 1, f"--threshold is a share from 0 to 1, not {threshold}")
    (earlier, earlier_rows), (later, later_rows) = read_profile(before), read_profile(after)
    console = Console()
    changes = compare_rows(earlier_rows, later_rows, threshold)
    if not changes:
        raise UserError(f"{before} and {after} have no measured row in common; compare two profiles of the same run")
    print_sentences(console, [f"warning: {sentence}" for sentence in differences(earlier, later)])
    lost, needed = lost_rows(earlier_rows, later_rows), needed_rows(earlier)
    print_sentences(console, [f"warning: measured before and not any more: {'; '.join(row.name for row in lost)}"] if lost else [])
    console.print(changes_table(changes, threshold))
    worse = [change.before.name for change in changes if change.outcome == "slower"]
    worse += [f"{row.name} (not measured any more)" for row in lost if row.key in needed]
    print_sentences(console, [f"regression: {', '.join(worse)}" if worse else "no regression"])
    if worse:
        raise typer.Exit(1)
