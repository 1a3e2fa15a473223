"""Check a shard folder: every checksum, every sample against the index, every image by decoding it (format: shards/README.md).

python tools/verify_shards.py shards/cifar100-lt
"""

from __future__ import annotations

if __name__ == "__main__":
    from bce3s.command_line.ending import die_of_interrupts

    die_of_interrupts()  # during the imports below there is nothing to tidy up

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bce3s.cli import run_app
from bce3s.command_line.options import Quiet
from pipelines.conversion.beton import check_beton
from pipelines.format import open_shards
from pipelines.format.index import read_manifest
from pipelines.format.repair import repair_indexes
from pipelines.format.verify import verified_bytes, verify_shards
from pipelines.types import SPLITS, ShardError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["--help", "-h"]})
_MAX_SHOWN = 50


@contextmanager
def _progress(console: Console, task: str, root: Path, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of tars and betons; gives what `on_bytes` wants."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    total = verified_bytes(read_manifest(root)[0])
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        number = progress.add_task(task, total=total)
        yield lambda num_bytes: progress.advance(number, num_bytes)


def beton_faults(root: Path) -> list[str]:
    """Compares every beton with the tars of its split, byte for byte; a sentence for each difference.

    Raises:
        ShardError: the shards do not open.
    """
    shards = open_shards(root)
    betons = {name: shards.manifest["splits"][name]["beton"] for name in SPLITS if "beton" in shards.manifest["splits"][name]}
    if not betons:
        return []
    return [fault for name, entry in betons.items() for fault in check_beton(root / entry["file"], shards.split(name))]


def _print_problems(console: Console, problems: list[str], style: str) -> None:
    for problem in problems[:_MAX_SHOWN]:
        console.print(problem, style=style, markup=False, highlight=False, soft_wrap=True)
    if len(problems) > _MAX_SHOWN:
        console.print(f"… and {len(problems) - _MAX_SHOWN:,} more", style=style, highlight=False)


def _repair(console: Console, root: Path, *, shown: bool) -> None:
    if not (root / "manifest.json").exists():
        repair_indexes(root)  # says why that cannot be done
    with _progress(console, "reading tars", root, shown=shown) as on_bytes:
        repair = repair_indexes(root, on_bytes=on_bytes)
    for sentence in repair.done or ["nothing to repair: every index is what its tars say"] * (not repair.problems):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    _print_problems(console, [str(problem) for problem in repair.problems], "red")


@app.command()
def verify(
    root: Annotated[Path, typer.Argument(help="Shard folder.")],
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode every image, not only its header.")] = True,
    repair_index: Annotated[
        bool, typer.Option("--repair-index", help="First rebuild every index that does not fit its tars, where the tars are whole.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Check a shard folder; exit status 1 where something is wrong."""
    console = Console()
    if repair_index:
        _repair(console, root, shown=not quiet)
    manifest, _ = read_manifest(root)
    with _progress(console, "verifying", root, shown=not quiet) as on_bytes:
        problems = verify_shards(root, decode=decode, on_bytes=on_bytes)
    faults = [str(problem) for problem in problems if not problem.warning]
    try:
        faults += [] if faults else beton_faults(root)
    except ShardError as error:
        faults.append(str(error))
    _print_problems(console, [f"warning: {problem}" for problem in problems if problem.warning], "yellow")
    _print_problems(console, faults, "red")
    if faults:
        raise typer.Exit(1)
    num_images = sum(manifest["splits"][name]["num_samples"] for name in SPLITS)
    num_shards = sum(len(manifest["splits"][name]["shards"]) for name in SPLITS)
    checked = "verified" if decode else "verified without decoding"
    console.print(f"{num_images:,} images in {num_shards:,} shards {checked}", highlight=False)


if __name__ == "__main__":
    run_app(app)
