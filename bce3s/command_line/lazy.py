"""The root of a command line whose commands are imported when they are asked for: the list of them costs nothing but typer."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

import bce3s

_EPILOG = """Exit status: 0 done; 1 the command ran, and what it checks does not hold; 2 a mistake, said in a sentence; 130 interrupted."""


class Entry(NamedTuple):
    """One command: "module:function", and the sentence that the list of commands shows, the first of the function's docstring."""

    place: str
    summary: str


class LazyGroup(TyperGroup):
    """A group whose commands are named in `entries`; of each, typer has a stand-in with its name and its sentence."""

    entries: ClassVar[Mapping[str, Entry]] = {}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself in place of its stand-in, for whoever runs it, asks for its help or completes its options."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, stand_in if name is None else load_command(name, self.entries[name]), rest


def load_command(name: str, entry: Entry) -> Any:
    """Imports a command and gives what typer makes of it."""
    module, function = entry.place.split(":")
    alone = typer.Typer(add_completion=False)
    alone.command(name)(getattr(import_module(module), function))
    command: Any = get_command(alone)
    for parameter in command.params:
        if getattr(parameter, "hidden", False):  # typer keeps hidden arguments out of the help, and shows them in the line above it
            parameter.get_usage_pieces = lambda ctx: []
    return command


def build_application(commands: Mapping[str, Entry]) -> typer.Typer:
    """The application of these commands, shown in their order."""
    group = type("Commands", (LazyGroup,), {"entries": commands})
    # A traceback is of a bug, and then Python's own: an issue needs its lines as they are.
    app = typer.Typer(
        cls=group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        epilog=_EPILOG,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_root)
    for name, entry in commands.items():
        app.command(name, help=entry.summary)(_stand_in)
    return app


def _stand_in() -> None:
    raise AssertionError("a stand-in is never run")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed_version

        try:
            torch = f"torch {installed_version('torch')}"  # importing it would take seconds
        except PackageNotFoundError:
            torch = "no torch"
        typer.echo(f"bce3s {bce3s.__version__} ({torch}, Python {platform.python_version()})")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, with torch's, and stop.")
    ] = False,
) -> None:
    """Train long-tailed image recognisers, fast."""
