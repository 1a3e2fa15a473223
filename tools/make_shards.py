"""Convert a data set of images into WebDataset shards with manifest and index, and on request FFCV files and class-balanced streams.

python tools/make_shards.py --dataset inat18 --source ~/inat2018 --out shards/inat18      (format: shards/README.md)
python tools/make_shards.py merge --out shards/inat18                                     (after --part 1/8 … --part 8/8)
"""

from __future__ import annotations

if __name__ == "__main__":
    from bce3s.command_line.ending import die_of_interrupts

    die_of_interrupts()  # during the imports below there is nothing to tidy up

import inspect
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, get_type_hints

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from bce3s.cli import run_app
from bce3s.command_line.options import ON_ERROR, named
from pipelines.config import require, require_choice
from pipelines.conversion import (
    EXECUTORS,
    FORMATS,
    RESAMPLINGS,
    ExecutorOptions,
    Resampling,
    WriteOptions,
    WriteReport,
    estimate_work,
    merge_parts,
    write_shards,
)
from pipelines.conversion.orders import write_orders
from pipelines.datasets import DATASETS, DatasetOptions, open_dataset, shot_groups
from pipelines.format import PixelOptions
from pipelines.format.index import MANIFEST_FILE
from pipelines.store import is_remote
from pipelines.types import SPLITS, ConfigError, DatasetError, IntArray, OpenDataset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["--help", "-h"]})
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_QUALITY_RESIZED, _QUALITY_KEPT = 90, 95
_SHOWN_SENTENCES = 20
_LINE_EVERY_S = 60.0  # of a stage, where there is no terminal to show a bar

Option = typer.Option
_SOURCE, _PIXELS, _BALANCE, _RUN = "Source", "Output", "Class-balanced resampling", "How it runs"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of the command line, by the names typed."""

    dataset: Annotated[str | None, Option(help=f"Data set of the shards: {', '.join(DATASETS)}.", rich_help_panel=_SOURCE)] = None
    source: Annotated[Path | None, Option(help="Folder of the original data, or archive.", rich_help_panel=_SOURCE)] = None
    lists: Annotated[Path | None, Option(help="Folder of the published lists or annotations.", rich_help_panel=_SOURCE)] = None
    classes: Annotated[int | None, Option(help="Of CIFAR: the first so many classes only.", rich_help_panel=_SOURCE)] = None
    imbalance_factor: Annotated[float | None, Option(help="Largest class over smallest, at least 1.", rich_help_panel=_SOURCE)] = None
    subset: Annotated[str | None, Option(help="Images of a class that are kept: first or seeded.", rich_help_panel=_SOURCE)] = None
    val_per_class: Annotated[int | None, Option(help="Training images a class set aside for val.", rich_help_panel=_SOURCE)] = None
    val_fraction: Annotated[float | None, Option(help="Share of train for val where there is none.", rich_help_panel=_SOURCE)] = None
    test_fraction: Annotated[float | None, Option(help="Share of train for test where there is none.", rich_help_panel=_SOURCE)] = None
    strict: Annotated[bool, Option("--strict", help="Refuse a set unlike the published one.", rich_help_panel=_SOURCE)] = False
    limit: Annotated[int | None, Option(help="At most so many images of each split.", rich_help_panel=_SOURCE)] = None

    out: Annotated[str | None, named("--out", more=", or fsspec URL; default shards/DATASET", rich_help_panel=_PIXELS)] = None
    format: Annotated[str, Option(help="wds, or wds,ffcv for .beton files as well.", rich_help_panel=_PIXELS)] = "wds"
    keep: Annotated[bool, Option("--keep-bytes", "--keep", help="Those of plain JPEG and PNG (default).", rich_help_panel=_PIXELS)] = False
    min_side: Annotated[int | None, Option(help="Shrink so that the shorter side is this.", rich_help_panel=_PIXELS)] = None
    max_side: Annotated[int | None, Option(help="Shrink so that the longer side is this.", rich_help_panel=_PIXELS)] = None
    quality: Annotated[
        int | None, Option(help=f"Of JPEGs written; {_QUALITY_RESIZED} shrunk, else {_QUALITY_KEPT}.", rich_help_panel=_PIXELS)
    ] = None
    no_validate: Annotated[bool, Option("--no-validate", help="Believe the headers of plain JPEGs.", rich_help_panel=_PIXELS)] = False
    shard_bytes: Annotated[str, Option(help="What a shard holds, about.", rich_help_panel=_PIXELS)] = "256MiB"
    seed: Annotated[int, named("--seed", more=" of subset, splits, order and resampling", rich_help_panel=_PIXELS)] = 0

    resample: Annotated[list[str] | None, Option(help=f"{', '.join(RESAMPLINGS)}; may be repeated.", rich_help_panel=_BALANCE)] = None
    resample_exponent: Annotated[float, Option(help="p of power: n^(-p).", rich_help_panel=_BALANCE)] = 1.0
    effective_number_beta: Annotated[float, Option(help="β of effective-number.", rich_help_panel=_BALANCE)] = 0.999
    balanced_epoch_size: Annotated[int | None, Option(help="Draws; default as many as train.", rich_help_panel=_BALANCE)] = None
    materialise: Annotated[bool, Option("--materialise", help="Copy the draws into tars.", rich_help_panel=_BALANCE)] = False

    processes: Annotated[int | None, Option(help="Default: one a core.", rich_help_panel=_RUN)] = None
    threads: Annotated[int | None, Option(help="Of each process; more hide a slow disk.", rich_help_panel=_RUN)] = None
    executor: Annotated[str, Option(help=f"{' or '.join(EXECUTORS)} (RAY_ADDRESS).", rich_help_panel=_RUN)] = "local"
    part: Annotated[str | None, Option(help="I/N: convert every N-th shard only; then merge.", rich_help_panel=_RUN)] = None
    on_error: Annotated[str, Option(help=ON_ERROR.help, rich_help_panel=_RUN)] = "stop"
    resume: Annotated[bool, named("--resume", more=": a conversion that was killed", rich_help_panel=_RUN)] = False
    overwrite: Annotated[bool, named("--overwrite", rich_help_panel=_RUN)] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Counts, bytes, time; write nothing.", rich_help_panel=_RUN)] = False
    quiet: Annotated[bool, named("--quiet", "-q", rich_help_panel=_RUN)] = False

    def dataset_options(self) -> DatasetOptions:
        """What the data set is opened with."""
        own = {field.name for field in fields(DatasetOptions)}
        return DatasetOptions(**{name: value for name, value in vars(self).items() if name in own})

    def write_options(self) -> WriteOptions:
        """How its shards are written."""
        require(not (self.keep and (self.min_side or self.max_side)), "--keep and shrinking exclude each other: drop one of them")
        shrunk = self.min_side is not None or self.max_side is not None
        streams = [
            Resampling(
                sampling=sampling,
                exponent=self.resample_exponent,
                beta=self.effective_number_beta,
                epoch_size=self.balanced_epoch_size,
                seed=self.seed,
                materialised=self.materialise,
            )
            for sampling in self.resample or ()
        ]
        require(bool(streams) or not self.materialise, "--materialise copies a resampled stream: say which with --resample")
        require(bool(streams) or self.balanced_epoch_size is None, "--balanced-epoch-size needs --resample")
        for option, default, reader in (("resample_exponent", 1.0, "power"), ("effective_number_beta", 0.999, "effective-number")):
            unread = getattr(self, option) != default and reader not in (self.resample or ())
            require(not unread, f"--{option.replace('_', '-')} is that of --resample {reader}, which is not asked for")
        hands = {"executor": self.executor} | ({"num_processes": self.processes} if self.processes is not None else {})
        return WriteOptions(
            shard_bytes=parse_bytes(self.shard_bytes),
            pixels=PixelOptions(
                min_side=self.min_side,
                max_side=self.max_side,
                quality=self.quality if self.quality is not None else _QUALITY_RESIZED if shrunk else _QUALITY_KEPT,
                validate=not self.no_validate,
            ),
            on_error=self.on_error,
            formats=parse_formats(self.format),
            resamplings=tuple(streams),
            overwrite=self.overwrite,
            resume=self.resume,
            part=parse_part(self.part),
            executor=ExecutorOptions(**hands),  # type: ignore[arg-type]
            num_threads=self.threads,
        )


def parse_bytes(text: str) -> int:
    """Bytes of '256MiB', '1G' or '100000'.

    Raises:
        ConfigError: not a number with one of the known units.
    """
    digits = text.strip().rstrip("BbKkMmGgTtIi")
    unit = text.strip()[len(digits) :].lower()
    unit = unit if unit in _UNITS else unit.removesuffix("b")
    try:
        return int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"'{text}' is not a size; write bytes or a number with a unit, such as 256MiB or 1G") from None


def parse_formats(text: str) -> tuple[str, ...]:
    """('wds', 'ffcv') of 'wds,ffcv'; tars and index are always made, for a beton shares them."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names or (text,):
        require_choice("format", name, FORMATS)
    return names


def parse_part(text: str | None) -> tuple[int, int] | None:
    """(2, 8) of '2/8'."""
    if text is None:
        return None
    number, _, parts = text.partition("/")
    require(number.isdecimal() and parts.isdecimal() and int(parts) > 0, f"'{text}' is not a part; write I/N, such as 2/8")
    return int(number), int(parts)


def require_apart(source: Path | None, out: str) -> None:
    """Neither of both may lie in the other: --overwrite removes one of them."""
    if source is None or is_remote(out):
        return
    here, there = source.resolve(), Path(out.removeprefix("file://")).resolve()
    if here in (there, *there.parents) or there in here.parents:
        raise ConfigError(f"--out {out} and --source {source} lie in one another; choose another --out")


class StageProgress:
    """A bar for each stage of a conversion: images, time left, rates, what was skipped. Without a terminal, lines now and then."""

    def __init__(self, console: Console) -> None:
        """Shows nothing until the first stage reports."""
        # A narrow terminal cuts names and rates short instead of breaking the line.
        name_width = max(6, min(32, console.width - 62))
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=name_width)),
            BarColumn(bar_width=max(4, min(20, (console.width - 60) // 2))),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[rates]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        )
        self._console = console
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=5, expand=True)
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[int, int, float]] = {}
        self._line_s: dict[str, float] = {}

    def __call__(self, stage: str, total: int, images: int, num_bytes: int, skipped: int) -> None:
        """Takes running totals of `stage`."""
        now_s = time.monotonic()
        if stage not in self._tasks:
            if not self.bars.live.is_started and not self.bars.disable:
                self.bars.start()  # its thread must not exist before the workers are forked
            self._tasks[stage] = self.bars.add_task(stage, total=total, rates="")
            self._first[stage] = images + skipped, num_bytes, now_s
            self._line_s[stage] = now_s
        first, first_bytes, started_s = self._first[stage]
        elapsed_s = max(now_s - started_s, 1e-3)
        rates = [f"{skipped:,} skipped"] if skipped else []  # first, for it is what must not be cut
        done = images + skipped
        if done > first:  # what was there at the first report took a time that nobody knows: a small set has no rate
            rates.append(f"{(done - first) / elapsed_s:,.0f} images/s")
            rates += [f"{(num_bytes - first_bytes) / 1e6 / elapsed_s:,.0f} MB/s"] if num_bytes > first_bytes else []
        self.bars.update(self._tasks[stage], completed=done, rates=", ".join(rates))
        if self.bars.disable and (now_s - self._line_s[stage] > _LINE_EVERY_S or (done == total and self._line_s[stage] < float("inf"))):
            self._line_s[stage] = now_s if done < total else float("inf")
            say(self._console, ", ".join((f"{stage}: {done:,} of {total:,} images", *rates)))


def say(console: Console, sentence: str) -> None:
    """Prints a line as it is: what looks like markup in a path is none, and the terminal wraps it, if anybody."""
    console.print(sentence, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def interruptible(how_to_continue: str) -> Iterator[None]:
    """Makes of Ctrl-C and of SIGTERM a sentence and an exit status of 130 or 143, with everything tidied up in between."""
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)  # a forked worker, which has nothing to tidy up
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {how_to_continue}", file=sys.stderr)
        raise typer.Exit(128 + (interrupt.args or (signal.SIGINT,))[0]) from None


@contextmanager
def shown_progress(console: Console) -> Iterator[StageProgress]:
    """Bars that are gone from the terminal's hands when the block ends, however it ends."""
    progress = StageProgress(console)
    try:
        yield progress
    finally:
        progress.bars.stop()


def print_report(console: Console, name: str, report: WriteReport, out: str) -> None:
    """A table of the splits, then what was re-encoded and skipped; where nobody wants to see that, what is to be known of it."""
    if console.quiet:
        if report.num_skipped:
            print(f"warning: {report.num_skipped:,} images skipped because they do not decode, see {MANIFEST_FILE}", file=sys.stderr)
        print(f"shards: {out}")
        return
    counts_K = report.class_counts["train"]
    filled_K = counts_K[counts_K > 0]
    table = Table("split", Column("images", justify="right"), title=f"{name}: {len(counts_K):,} classes", title_justify="left")
    for split in SPLITS:
        table.add_row(split, f"{int(report.class_counts[split].sum()):,}")
    for stream in report.resampled:
        table.add_row(f"train, {stream['name']}" + (", in tars" if stream["materialised"] else ""), f"{stream['epoch_size']:,}")
    console.print(table)
    groups = ", ".join(f"{int(members.sum())} {group}" for group, members in shot_groups(counts_K).items())
    factor = filled_K.max() / filled_K.min()
    say(console, f"training images a class: {filled_K.max():,} … {filled_K.min():,} (imbalance factor {factor:.0f})")
    say(console, f"shot groups: {groups}")
    if report.num_reencoded:
        say(console, f"{report.num_reencoded:,} images were shrunk or re-encoded")
    for sentence in report.skipped[:_SHOWN_SENTENCES]:
        say(console, f"skipped: {sentence}")
    if report.num_skipped > _SHOWN_SENTENCES:
        say(console, f"… and {report.num_skipped - _SHOWN_SENTENCES:,} more, see {MANIFEST_FILE}")
    if report.num_skipped:
        say(console, f"{report.num_skipped:,} images skipped because they do not decode")
    say(console, f"shards: {out}")


def print_estimate(console: Console, dataset: OpenDataset, orders: dict[str, IntArray], options: WriteOptions) -> None:
    """What a dry run says."""
    with console.status("converting a few images, to see"):
        estimate, num_bytes = estimate_work(dataset, orders, options)
    num_samples = {split: len(order_N) for split, order_N in orders.items()}
    columns = (Column(name, justify="right") for name in ("images", "bytes", "shards"))
    table = Table("split", *columns, title=f"{dataset.name}: {len(dataset.class_names):,} classes, dry run", title_justify="left")
    for split, num in num_samples.items():
        split_bytes = int(num * estimate.sample_bytes[split])
        table.add_row(split, f"{num:,}", decimal(split_bytes), f"{-(-split_bytes // options.shard_bytes):,}")
    console.print(table)
    _, work_s = estimate.total(num_samples)
    cores = min(options.executor.num_processes, os.cpu_count() or 1)
    say(console, f"about {decimal(num_bytes)} in {timedelta(seconds=round(work_s / cores))} on {cores} cores; nothing was written")


def convert(request: Request) -> None:
    """Converts what `request` names."""
    require(request.dataset is not None, f"--dataset is missing; known: {', '.join(DATASETS)}")
    name = request.dataset or ""
    require_choice("dataset", name, tuple(DATASETS))
    require(request.limit is None or request.limit >= 1, f"--limit must be at least 1, not {request.limit}")
    require(request.out != "", "--out is empty: name a folder or a URL, or leave it out")
    options = request.write_options()
    out = request.out or str(Path("shards") / name)
    require_apart(request.source, out)
    console = Console(quiet=request.quiet and not request.dry_run)
    with console.status(f"opening {name}"):  # the demo set is drawn here, large folders are listed here
        opened = open_dataset(name, request.dataset_options())
    for sentence in opened.complaints:
        if request.strict:
            raise DatasetError(f"{sentence} (--strict)")
        print(f"warning: {sentence}", file=sys.stderr)
    recorded = {"seed": request.seed} | ({"limit": request.limit} if request.limit is not None else {})
    opened = replace(opened, options={**opened.options, **recorded})
    orders = write_orders(opened, request.seed, request.limit)
    if request.dry_run:
        print_estimate(console, opened, orders, options)
        return
    counts = ", ".join(f"{split} {len(order_N):,}" for split, order_N in orders.items())
    say(console, f"{name}: {len(opened.class_names):,} classes; images: {counts}; to {out}")
    with shown_progress(console) as progress:
        report = write_shards(opened, orders, out, options, progress)
    if report is None:
        say(console, f"part {request.part} of {out} is done; when all are: make_shards.py merge --out {out}")
    else:
        print_report(console, name, report, out)


@app.command("merge")
def merge(out: Annotated[str, named("--out", more=": that of the parts")], quiet: Annotated[bool, named("--quiet", "-q")] = False) -> None:
    """Complete a folder whose shards were converted with --part 1/N … --part N/N."""
    console = Console(quiet=quiet)
    with interruptible("the same command continues"), shown_progress(console) as progress:
        report = merge_parts(out, on_progress=progress)
    print_report(console, "merged", report, out)


def _command(context: typer.Context, **options: object) -> None:
    if context.invoked_subcommand is None:
        with interruptible("finished shards are kept; the same command with --resume continues"):
            convert(Request(**options))  # type: ignore[arg-type]


# Typer reads a signature; the options are the fields of `Request`, so that they are written down once.
_hints = get_type_hints(Request, include_extras=True)
_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    + [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_hints[field.name])
        for field in fields(Request)
    ]
)
_command.__annotations__ = {"context": typer.Context, **_hints}
app.callback(invoke_without_command=True, help="Convert a data set of images into shards.")(_command)


if __name__ == "__main__":
    run_app(app)
