"""The command `bce3s export`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bce3s.command_line import options
from bce3s.command_line.names import completing, names_in
from bce3s.command_line.options import named

if TYPE_CHECKING:
    from bce3s.export.write import Written

_NAMES = names_in("bce3s.export.formats", "FORMATS")


def export(
    place: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, of a stage two as well, or a checkpoint file.")],
    format_name: Annotated[str, typer.Option("--format", help=f"{', '.join(_NAMES)}.", autocompletion=completing(_NAMES))],
    out: Annotated[Path | None, named("--out", more=" for timm, else file; default RUN/export/ARCH with the format's suffix")] = None,
    checkpoint: options.Checkpoint = None,
    average: Annotated[bool, typer.Option("--average", help="The moving average of the weights, where the run kept one.")] = False,
    preprocess: Annotated[bool, typer.Option("--preprocess", help="The graph takes uint8 pixels and normalises them itself.")] = False,
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators; default 18.", show_default=False)] = 0,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="The graph takes images of any height and width.")] = False,
    shards: Annotated[
        str | None, named("--shards", more=" or URL to check on; default what the run was trained on, if it is there")
    ] = None,
    device: options.Device = "cpu",
    overwrite: Annotated[bool, named("--overwrite")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not compare its logits with those of the trained network.")] = False,
    json_output: Annotated[bool, named("--json", more=": files and check")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a trained network for other programs.

    It is read back from disk and compared with the trained network, and a model card is put beside it.
    One whose logits differ is not put in place; the exit status is then 1.
    """
    from bce3s.export.formats import GraphOptions, load_format
    from pipelines.config import require, require_choice

    require_choice("checkpoint", checkpoint or "last", ("last", "best"))
    graph = GraphOptions(preprocess=preprocess, opset=opset, dynamic_size=dynamic_size)
    chosen = load_format(format_name, graph)
    from bce3s.export.place import default_out, require_room
    from bce3s.export.plain import Export, plain_network
    from bce3s.export.write import write_checked
    from bce3s.train import average_applied, open_network

    is_file = place.suffix == ".safetensors"
    require(not (is_file and checkpoint), f"--checkpoint chooses one of a run folder, and {place} is one already: leave it out")
    trained = open_network(place, checkpoint or ("last" if average and not is_file else None), device)
    for sentence in trained.skipped:
        typer.echo(f"warning: {sentence}; taking the one before", err=True)
    out = out or default_out(trained, chosen.suffix)
    require_room(out, chosen.suffix, overwrite=overwrite)
    with average_applied(trained.state, trained.model, trained.config, trained.path) if average else nullcontext():
        exported = Export(network=plain_network(trained.model), trained=trained, average=average)
        written = write_checked(exported, chosen, graph, out, shards=shards, check=not no_check)
    _say(written, format_name, json_output=json_output, quiet=quiet)
    if not written.is_there:
        raise typer.Exit(1)


def _say(written: Written, format_name: str, *, json_output: bool, quiet: bool) -> None:
    """One JSON object, or a line for the files and one for the check."""
    parity, out = written.parity, written.out
    if json_output:
        found = None if parity is None else {"holds": parity.holds, **parity.to_dict()}
        places = {"out": str(out), "model_card": str(written.card)} if written.is_there else {"out": None, "model_card": None}
        typer.echo(json.dumps({**places, "format": format_name, "bytes": written.num_bytes, "parity": found}, indent=1))
        return
    if parity is not None and not parity.holds:
        typer.echo(f"NOT WRITTEN: {out}, for it does not compute what the trained network does: {parity.sentence()}", err=True)
        return
    typer.echo(f"wrote {out} ({written.num_bytes / 1e6:.1f} MB) and its model card {written.card}")
    if not quiet:
        why = f"; real images were not to be had: {parity.why_random}" if parity and parity.why_random else ""
        typer.echo(f"checked: {parity.sentence()}{why}" if parity else "not checked against the trained network")
