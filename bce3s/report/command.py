"""The command `bce3s report`. Torch and the drawing library are imported only once it runs, so `--help` is instant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bce3s.command_line import options
from bce3s.command_line.names import completing
from bce3s.command_line.options import named

if TYPE_CHECKING:
    from bce3s.report.figures import Figure, Missing
    from bce3s.report.findings import Findings

    Drawn = dict[str, Figure | Missing]

_FORMATS = ("png", "svg")
_MIB = 1 << 20


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, of stages two and seeds too; several are shown side by side.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="Folder for a file of each figure, as for a paper.")] = None,
    image_format: Annotated[str, typer.Option("--format", help="Of --figures: png or svg.", autocompletion=completing(_FORMATS))] = "png",
    no_model: Annotated[bool, typer.Option("--no-model", help="Only what the runs recorded; nothing is measured.")] = False,
    shards: options.ShardsOfRun = None,
    checkpoint: options.Checkpoint = None,
    device: options.Device = "auto",
    overwrite: Annotated[bool, named("--overwrite", more=", and figures")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw one page of figures of one or several runs."""
    from pipelines.config import require_choice

    require_choice("checkpoint", checkpoint or "last", ("last", "best"))
    require_choice("format", image_format, _FORMATS)
    _require_drawing()
    _require_room(out, overwrite=overwrite)
    if figures is not None:
        _require_room_for_figures(figures, image_format, overwrite=overwrite)
    from bce3s.report.figures import draw_figures
    from bce3s.report.page import render_page
    from pipelines.durable import write_atomically
    from pipelines.types import ConfigError

    asked = {"model": not no_model, "shards": shards, "checkpoint": checkpoint, "device": device}
    found = _read(runs, asked, quiet=quiet)
    drawn = draw_figures(found.runs)
    page = render_page(found, drawn).encode()
    try:
        write_atomically(out, page)
        files = [] if figures is None else _write_figures(figures, drawn, image_format)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or out}: {error.strerror or error}; choose another --out or --figures") from error
    typer.echo(f"{out} ({len(page) / _MIB:.1f} MiB): open it in a browser")
    if figures is not None:
        typer.echo(f"{figures}: {', '.join(files)}")
    for sentence in () if quiet else _left_out(found, drawn):
        typer.echo(sentence, err=True)


def _require_drawing() -> None:
    """Raises `BackendError` before minutes of measuring where the page could not be drawn."""
    from pipelines.types import BackendError

    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise BackendError(f"bce3s report needs {error.name}; run pip install 'bce3s[report]'") from error


def _require_room(out: Path, *, overwrite: bool) -> None:
    from pipelines.config import require

    require(not out.is_dir(), f"--out {out} is a folder; name the page in it, such as {out / 'report.html'}")
    require(out.absolute().parent.is_dir(), f"--out {out} has no place: make the folder {out.parent} first")
    require(overwrite or not out.exists(), f"{out} is there already; add --overwrite to replace it, or choose another --out")


def _require_room_for_figures(folder: Path, image_format: str, *, overwrite: bool) -> None:
    from bce3s.report.figures import FIGURE_NAMES
    from pipelines.config import require

    require(not folder.exists() or folder.is_dir(), f"--figures {folder} is a file; name a folder")
    for name in FIGURE_NAMES:
        path = folder / f"{name}.{image_format}"
        require(overwrite or not path.exists(), f"{path} is there already; add --overwrite to replace it, or choose another --figures")


def _read(places: list[Path], asked: dict[str, Any], *, quiet: bool) -> Findings:
    """The findings, under a bar for each run that is measured."""
    from rich.console import Console
    from rich.progress import Progress

    from bce3s.report.read import Asked, read_findings
    from pipelines.format.bus_error import explain_bus_errors_of

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        tasks = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(f"measuring {name}", total=total)
            progress.update(tasks[name], completed=done)

        return read_findings(places, Asked(**asked, on_open=explain_bus_errors_of, on_step=advance))


def _write_figures(folder: Path, drawn: Drawn, image_format: str) -> list[str]:
    """Each figure's file; their names."""
    from bce3s.report.figures import Figure
    from pipelines.durable import write_atomically

    images = {f"{name}.{image_format}": figure.image(image_format) for name, figure in drawn.items() if isinstance(figure, Figure)}
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, image in images.items():
        write_atomically(folder / file_name, image)
    return list(images)


def _left_out(found: Findings, drawn: Drawn) -> list[str]:
    """What the page cannot show, and what it notes; each sentence once."""
    from bce3s.report.figures import Missing

    missing = [f"not shown: {figure.title}: {figure.sentence}" for figure in drawn.values() if isinstance(figure, Missing)]
    said_by: dict[str, dict[str, None]] = {}
    for run in found.runs:
        for note in run.notes:
            said_by.setdefault(note.sentence, {})[run.name] = None
    notes = []
    for sentence, names in said_by.items():
        named = [name for name in names if len(found.runs) > 1 and name not in sentence]
        notes.append(f"note: {', '.join(named)}{': ' if named else ''}{sentence}")
    return list(dict.fromkeys([*missing, *notes]))
