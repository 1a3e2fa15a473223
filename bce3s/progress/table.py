"""The table that a command ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from bce3s.progress.sentences import percent
from bce3s.progress.standing import ACCURACIES

if TYPE_CHECKING:
    from bce3s.metrics import Accuracy


def accuracy_table(title: str, rows: dict[str, Accuracy], caption: str) -> Table:
    """Accuracies by shot group and calibration error, one row a measurement; the first row is the headline."""
    measured = next((accuracy.calibration for accuracy in rows.values() if accuracy.calibration is not None), None)
    if measured is not None:
        caption += f"; ECE: {len(measured.bin_counts)} bins, confidence is the largest {measured.confidence}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("top-1 accuracy, %")
    for name in (*ACCURACIES, "ECE"):
        table.add_column(name, justify="right")
    for position, (name, accuracy) in enumerate(rows.items()):
        figures = accuracy.headline()
        values = [percent(figures[group]) for group in (*ACCURACIES, "ece")]
        table.add_row(name, *values, style="bold" if position == 0 else None)
    return table
