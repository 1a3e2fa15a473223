"""The command `bce3s reproduce`. Torch is imported only once it trains, so `--help` and `--list` are quick."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bce3s.command_line import options
from bce3s.command_line.names import completing, setting_names, table_names
from bce3s.command_line.options import named

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from bce3s.reproduce.grid import Table

_BUDGETS = completing(("full", "small"))
_SOURCE = typer.Option(help="Folder of the original data: the unpacked CIFAR archives; shards are made from it once.")
_SET = named("--set", more=", for all rows: --set precision=bf16", metavar="PATH=VALUE", autocompletion=completing(setting_names))


def reproduce(
    table: Annotated[
        str | None, typer.Argument(help=f"One of: {', '.join(table_names())}.", autocompletion=completing(table_names))
    ] = None,
    source: Annotated[Path | None, _SOURCE] = None,
    shards: Annotated[Path | None, named("--shards", more=", or folder of several by name; default made from --source")] = None,
    out: Annotated[Path | None, named("--out", more=": the table, its shards and runs; default reproduce/TABLE")] = None,
    budget: Annotated[
        str, typer.Option(help="full is the published recipe; small is for two CPU cores and minutes.", autocompletion=_BUDGETS)
    ] = "full",
    seeds: Annotated[str, named("--seeds", more=", of every row")] = "0,1,2",
    rows: Annotated[str | None, typer.Option(help="Rows to train, by name: a,b; default all.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    device: options.Device = "auto",
    settings: Annotated[list[str] | None, _SET] = None,
    list_tables: Annotated[bool, typer.Option("--list", help="Show the tables, or the rows of one, and stop.")] = False,
    json_output: Annotated[bool, named("--json", more=": the table, at the end")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a published table again, and write it with the published figures beside ours.

    The same command continues where it was stopped; finished runs are kept. TABLE.md and TABLE.json are written after every run.
    """
    from rich.console import Console

    from bce3s.reproduce.grid import BUDGETS
    from bce3s.reproduce.tables import TABLES, build_table, select_rows
    from bce3s.seeds import parse_seeds
    from pipelines.config import require, require_choice
    from pipelines.types import ConfigError

    console = Console(stderr=json_output, quiet=quiet and not list_tables)
    require_choice("budget", budget, tuple(BUDGETS))
    if list_tables:
        console.print(_list_of_tables(budget) if table is None else _list_of_rows(build_table(table, budget)))
        return
    if table is None:
        raise ConfigError(f"name a table: {', '.join(TABLES)}; --list shows what is in them")
    built = build_table(table, budget, settings or [])
    selected = select_rows(built, rows)
    require(jobs >= 1, f"--jobs must be at least 1, not {jobs}")
    require(source is None or shards is None, "--source has shards made and --shards names some that are there: give one of them")
    place = out or Path("reproduce") / (table if budget == "full" else f"{table}-{budget}")
    from bce3s.reproduce.session import Asked, reproduce_table

    asked = Asked(
        table=built,
        rows=tuple(selected),
        seeds=parse_seeds(seeds),
        out=place,
        source=source,
        shards=shards,
        jobs=jobs,
        device=device,
        arguments=tuple(sys.argv[1:]),
    )
    with ExitStack() as aside:  # for what the runs say, which would mix with the JSON
        if quiet:
            aside.enter_context(redirect_stdout(aside.enter_context(Path(os.devnull).open("w"))))
        elif json_output:
            aside.enter_context(redirect_stdout(sys.stderr))
        record = reproduce_table(asked, console)
    if json_output:
        typer.echo(json.dumps(record, indent=1))
    elif quiet:
        typer.echo(f"table: {place / table}.md   and .json beside it")


def _list_of_tables(budget: str) -> RichTable:
    from rich.table import Table as RichTable

    from bce3s.reproduce.tables import TABLES, build_table

    listed = RichTable("table", "rows", "runs a seed", "what it shows", title=f"tables, {budget} budget", title_justify="left")
    for name in TABLES:
        built = build_table(name, budget)
        trained = [row for row in built.rows if row.shards is not None]
        listed.add_row(name, str(len(built.rows)), str(len({row.run_name for row in trained})), built.title)
    return listed


def _list_of_rows(table: Table) -> RichTable:
    from rich.table import Table as RichTable

    listed = RichTable(title=table.title, title_justify="left")
    listed.add_column("row", no_wrap=True)
    for name in ("what it is", "settings"):
        listed.add_column(name, overflow="fold")
    listed.add_column("published", justify="right")
    for row in table.rows:
        published = "–" if row.published is None else f"{row.published.all:.2f}"
        own = " ".join(row.settings) or ("only published" if row.shards is None else "of the recipe")
        listed.add_row(row.name, row.title, own, published)
    return listed
