"""The rows for people: tables on a terminal, one unbroken line a finding elsewhere, so that `grep` and a paste work."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bce3s.doctor.rows import ADVICE, MISSING, OK, SECTIONS, Row
from bce3s.doctor.verdict import Verdict

_STYLES = {OK: "green", ADVICE: "yellow", MISSING: "red"}


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """All rows under the headings of their sections, and below them what to do, in lines that no column breaks."""
    if not console.is_terminal:
        for row in rows:
            remedy = f" -> {row.remedy}" if row.remedy else ""
            console.print(f"{row.status:<7}  {row.name}: {row.value}{remedy}", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row("", Text(SECTIONS[section], style="bold"), "")
        table.add_row(Text(row.status, style=_style(row)), Text(row.name), Text(row.value))
    console.print(table)
    remedies = [row for row in rows if row.remedy]
    width = max((len(row.name) for row in remedies), default=0)
    for row in remedies:
        console.print(Text.assemble((f"{row.name:<{width}}  ", _style(row)), row.remedy), soft_wrap=True)
    if remedies:
        console.print()


def _style(row: Row) -> str:
    """Red for what stands in the way alone: an extra that nobody asked for is no fault."""
    return "dim" if row.status == MISSING and not row.needed else _STYLES[row.status]


def print_verdict(console: Console, verdict: Verdict) -> None:
    """The verdict, and the command in a line of its own."""
    console.print(Text(verdict.sentence, style="bold" if verdict.can_train else "bold red"), soft_wrap=not console.is_terminal)
    if not verdict.can_train:
        return
    sentences = [f"Loader {verdict.loader}: {verdict.reason}."]
    sentences.append(
        f"Threads: {f'{verdict.num_threads}, as many as the control group allows' if verdict.num_threads else 'one per core'}."
    )
    batch = f"Batch size {verdict.batch_size}, the recipe's"
    if verdict.accumulate_steps > 1:
        batch += f", in {verdict.accumulate_steps} parts"
    if not verdict.fits:
        batch += "; by estimate that is too large for the memory even so: take a smaller --arch"
    elif verdict.accumulate_steps > 1:
        batch += ", so that by estimate it fits in memory"
    for sentence in (*sentences, f"{batch}."):
        console.print(sentence, highlight=False, markup=False, soft_wrap=not console.is_terminal)
    console.print(f"\n{verdict.command}", highlight=False, markup=False, soft_wrap=True)
