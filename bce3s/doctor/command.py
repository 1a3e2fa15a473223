"""The command `bce3s doctor`. It imports neither torch nor, unless it must, numpy: what may crash is looked at by other processes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bce3s.command_line import options

if TYPE_CHECKING:
    from rich.console import Console

    from bce3s.doctor.examine import Examination


def doctor(
    shards: Annotated[str | None, options.named("--shards", more=" or URL to choose the loader for; default by what is installed")] = None,
    path: Annotated[Path | None, typer.Option(help="Folder whose disk is measured; default the shards', or the working folder.")] = None,
    json_output: Annotated[bool, options.named("--json", more=": every row and the verdict")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what this machine has, what is missing and what to choose.

    Ends with a verdict and a training command to paste. The exit status is 1 where something is missing that training needs.
    """
    import json

    from rich.console import Console

    from bce3s.doctor.examine import examine

    at = _opened_at(shards) if shards else None
    shards = str(at.absolute()) if at else shards  # the processes that look have another working folder
    folder = path or at or Path.cwd()
    if not folder.is_dir():
        from pipelines.types import ConfigError

        raise ConfigError(f"--path {folder} is not a folder; name one on the disk that is to be measured")
    console, errors = Console(), Console(stderr=True)
    waiting = errors.is_terminal and not quiet
    with errors.status("importing everything, reading from the disk") if waiting else nullcontext():
        found = examine(shards, folder.absolute())
    if json_output:
        typer.echo(json.dumps({"rows": [row.to_dict() for row in found.rows], "verdict": found.verdict.to_dict()}, indent=1))
    else:
        _show(console, found, quiet)
    if not found.verdict.can_train:
        raise typer.Exit(1)


def _opened_at(shards: str) -> Path | None:
    """The folder of the shards, None of a URL; a mistake in their name is the user's, not the machine's."""
    try:
        from pipelines.format import open_shards
    except ImportError:
        return None  # numpy is broken, which has a row of its own
    root = open_shards(shards).root
    return root if isinstance(root, Path) else None


def _show(console: Console, found: Examination, quiet: bool) -> None:
    from bce3s.doctor.table import print_rows, print_verdict

    print_rows(console, [row for row in found.rows if row.status != "ok"] if quiet else found.rows)
    print_verdict(console, found.verdict)
