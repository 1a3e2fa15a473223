"""The command `bce3s predict`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bce3s.command_line import options

if TYPE_CHECKING:
    from rich.console import Console

    from bce3s.predict.files import Prediction, Predictor


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN|CKPT", help="Run folder, or a checkpoint: a .safetensors file.")],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE|DIR|-...", help="Files, folders with all below them, or - for paths on standard input.")
    ],
    top: Annotated[int, typer.Option(help="Classes to name, the most likely first.")] = 5,
    output_format: Annotated[
        str | None, typer.Option("--format", help="table, json (a line an image) or csv; default table on a terminal, else csv.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; .json and .jsonl name the format.")] = None,
    checkpoint: options.Checkpoint = None,
    device: options.Device = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Images at once; default the run's.")] = None,
    average: Annotated[bool, typer.Option("--average", help="The moving average of the weights, where the run kept one.")] = False,
    adjust_logits: Annotated[float, typer.Option(help="τ: take τ times the log of the class priors off the logits.")] = 0.0,
    no_validate: Annotated[bool, typer.Option("--no-validate", help="Believe the headers of plain JPEGs: faster, damage unseen.")] = False,
    overwrite: Annotated[bool, options.named("--overwrite")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Name the classes of images with a trained network.

    Images go through the pixels, network and precision of evaluation. A file that is no readable image is named on standard error and
    left out; the exit status is 1 then.
    """
    from bce3s.predict.inputs import image_paths, require_inputs
    from pipelines.config import require, require_choice

    require_choice("checkpoint", checkpoint or "last", ("last", "best"))
    require(top >= 1, f"--top must be at least 1, not {top}")
    require(batch_size is None or batch_size >= 1, f"--batch-size must be at least 1, not {batch_size}")
    require(0 <= adjust_logits < math.inf, f"--adjust-logits takes a τ from 0 on, such as 1, not {adjust_logits}")
    is_file = run.suffix == ".safetensors"
    require(not (is_file and checkpoint), f"--checkpoint chooses one of a run folder, and {run} is one already: leave it out")
    written_as = _format(output_format, out, images)
    require_inputs(images)
    if out is not None:
        require(out.absolute().parent.is_dir(), f"--out {out} lies in a folder that does not exist; make it first")
        require(not out.is_dir(), f"--out {out} is a folder; name a file")
        require(overwrite or not out.exists(), f"{out} is there already; add --overwrite to replace it, or choose another --out")
    with ExitStack() as stack:
        predictor, class_names = _opened(stack, run, checkpoint, device, average, (top, adjust_logits, batch_size, not no_validate))
        _write(predictor, image_paths(images), class_names, written_as, out, quiet)
        num_predicted, num_damaged = predictor.num_predicted, predictor.num_damaged
    if num_damaged:
        typer.echo(f"error: of {num_predicted + num_damaged:,} files, {num_damaged:,} could not be read as an image", err=True)
        raise typer.Exit(1)


def _format(asked: str | None, out: Path | None, images: list[str]) -> str:
    """The format that is asked for, that the suffix of --out names, or that suits where the output goes."""
    from bce3s.predict.inputs import STANDARD_INPUT, image_paths
    from bce3s.predict.output import FORMATS, TABLE_IMAGES
    from pipelines.config import require_choice

    if asked is not None:
        require_choice("format", asked, FORMATS)
        return asked
    if out is not None:
        return "json" if out.suffix.lower() in (".json", ".jsonl") else "csv"
    if not sys.stdout.isatty() or STANDARD_INPUT in images:
        return "csv"
    few = sum(1 for _ in zip(image_paths(images), range(TABLE_IMAGES + 1), strict=False)) <= TABLE_IMAGES
    return "table" if few else "csv"


def _opened(
    stack: ExitStack, run: Path, checkpoint: str | None, device: str, average: bool, options: tuple[int, float, int | None, bool]
) -> tuple[Predictor, tuple[str, ...]]:
    """The network, ready until `stack` ends, and the names of its classes."""
    from bce3s.predict.files import Predictor
    from bce3s.train import average_applied, open_network

    # No best checkpoint keeps an average.
    network = open_network(run, checkpoint or ("last" if average else None), device)
    for sentence in network.skipped:
        typer.echo(f"warning: {sentence}; taking the one before", err=True)
    stack.enter_context(average_applied(network.state, network.model, network.config, network.path) if average else nullcontext())
    network.model.eval()
    top, adjust_logits, batch_size, validate = options
    predictor = Predictor(network, top=top, adjust_logits=adjust_logits, batch_size=batch_size, validate=validate)
    return stack.enter_context(closing(predictor)), network.class_names


def _write(
    predictor: Predictor, paths: Iterator[str], class_names: tuple[str, ...], written_as: str, out: Path | None, quiet: bool
) -> None:
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from pipelines.config import require
    from pipelines.durable import replacing
    from pipelines.types import ConfigError

    errors = Console(stderr=True)
    # A bar would tear through what is printed to the same terminal.
    shown = not quiet and errors.is_terminal and (out is not None or not sys.stdout.isatty())
    columns = (TextColumn("{task.completed:,.0f} images"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=None)

        def warn(sentence: str) -> None:
            errors.print(f"warning: {sentence}", highlight=False, markup=False, soft_wrap=True)

        def counted() -> Iterator[Prediction]:
            for found in predictor.predict(paths, warn):
                progress.advance(task)
                yield found
            require(predictor.num_predicted + predictor.num_damaged > 0, "no paths came on standard input; give one a line")

        if out is None:
            _write_to(sys.stdout.buffer, counted(), class_names, predictor.confidence, written_as, Console())
            return
        try:
            with replacing(out) as file:
                _write_to(file, counted(), class_names, predictor.confidence, written_as, None)
        except OSError as error:
            raise ConfigError(f"cannot write {out} ({error.strerror or error}); name another --out") from error


def _write_to(
    file: Any, predictions: Iterator[Prediction], class_names: tuple[str, ...], confidence: str, written_as: str, console: Console | None
) -> None:
    """To a binary file; tables to `console`, where there is one, in its colours."""
    from bce3s.predict.output import csv_lines, json_lines, print_tables, write_lines

    if written_as != "table":
        to_lines, errors = (json_lines, "backslashreplace") if written_as == "json" else (csv_lines, "surrogateescape")
        write_lines(file, to_lines(predictions, class_names, confidence), errors)
        file.flush()
    elif console is not None:
        print_tables(console, predictions, class_names, confidence)
    else:
        import io

        from rich.console import Console

        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", write_through=True)
        print_tables(Console(file=text, width=120), predictions, class_names, confidence)
        text.detach()
