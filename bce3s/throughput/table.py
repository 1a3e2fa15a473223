"""The profile as a table for a terminal, a pipe or a log."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bce3s.throughput.rows import NAMES, SECTIONS, VIEWS_PER_DECODED, Row

_HEADING = f"{'decoded/s':>9} {'views/s':>9}  {'range, decoded/s':<16}"


def rows_table(rows: Sequence[Row], binding: str | None, num_repeats: int) -> Table:
    """All rows under the headings of their groups; the binding one in bold. Fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption=f"medians of {num_repeats} repeats")
    table.add_column("images/s", no_wrap=True)
    table.add_column(Text(_HEADING), overflow="fold")
    section = ""
    for row in rows:
        own_section = row.key.partition(".")[0]
        if own_section != section:
            section = own_section
            if section != row.key:
                table.add_row(Text(SECTIONS[section], style="italic"), "")
        name = f"  {NAMES[row.key]}" if section != row.key else SECTIONS[section]
        style = "bold" if row.key == binding else "" if row.rates else "dim"
        table.add_row(Text(name, style=style), Text(_figures(row), style=style))
    return table


def _figures(row: Row) -> str:
    if not row.rates:
        return f"not measured: {row.reason}"
    spread = f"{_rate(min(row.rates))}–{_rate(max(row.rates))}"
    return f"{_rate(row.median):>9} {_rate(row.median * VIEWS_PER_DECODED):>9}  {spread:<16} {row.note}".rstrip()


def _rate(rate: float) -> str:
    """Three digits at least, and no more decimals than that takes: 4.17, 41.7, 417, 4,170, 1.25 M."""
    if rate >= 1e6:
        return f"{rate / 1e6:.2f} M"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def print_sentences(console: Console, sentences: Sequence[str]) -> None:
    """One sentence a paragraph line, wrapped to the terminal; unbroken where there is none."""
    for sentence in sentences:
        if console.is_terminal:
            console.print(Padding(Text(sentence), (0, 0, 0, 0)))
        else:
            console.print(sentence, highlight=False, soft_wrap=True, markup=False)
