"""Predictions as CSV, JSON Lines or tables, written as they come."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

from pipelines.datasets.files import printable

if TYPE_CHECKING:
    from rich.console import Console

    from bce3s.predict.files import Prediction

FORMATS = ("table", "json", "csv")
TABLE_IMAGES = 50
"""Images up to which a terminal is shown a table unasked; a longer list of them is printed in tables of this many."""


def csv_lines(predictions: Iterable[Prediction], class_names: tuple[str, ...], confidence: str) -> Iterator[str]:
    """A heading, then a line a class: path, rank from 1, class, label, and its softmax or sigmoid, which the heading says."""
    yield _csv_line(["path", "rank", "class", "label", confidence])
    for found in predictions:
        for rank, (label, probability) in enumerate(zip(found.labels, found.probabilities, strict=True), 1):
            yield _csv_line([found.path, rank, class_names[label], label, f"{probability:.6g}"])


def json_lines(predictions: Iterable[Prediction], class_names: tuple[str, ...], confidence: str) -> Iterator[str]:
    """JSON Lines, an object an image, so that a reader need not wait for the last one."""
    for found in predictions:
        classes = [
            {"class": class_names[label], "label": label, "probability": float(f"{probability:.6g}")}
            for label, probability in zip(found.labels, found.probabilities, strict=True)
        ]
        yield json.dumps({"path": found.path, "confidence": confidence, "predictions": classes}, ensure_ascii=False) + "\n"


def print_tables(console: Console, predictions: Iterable[Prediction], class_names: tuple[str, ...], confidence: str) -> None:
    """Tables of up to 50 images, each printed when it is full."""
    from rich.table import Table
    from rich.text import Text

    remaining = iter(predictions)
    while some := list(islice(remaining, TABLE_IMAGES)):
        table = Table()
        table.add_column("image", overflow="fold")
        table.add_column("class", overflow="fold")
        table.add_column(confidence, justify="right", no_wrap=True)
        for found in some:
            for rank, (label, probability) in enumerate(zip(found.labels, found.probabilities, strict=True)):
                name = Text(printable(found.path)) if rank == 0 else ""
                title = Text(class_names[label], style="bold" if rank == 0 else "")
                table.add_row(name, title, f"{probability:.4f}", end_section=rank == len(found.labels) - 1)
        console.print(table)


def write_lines(file: BinaryIO, lines: Iterable[str], encoding_errors: str) -> None:
    """Writes UTF-8 lines as they come.

    Args:
        file: binary.
        lines: with their ends.
        encoding_errors: for names that are not UTF-8: "surrogateescape" gives their bytes back, "backslashreplace" what JSON reads.
    """
    for line in lines:
        file.write(line.encode("utf-8", encoding_errors))


def _csv_line(fields: list[str | int]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(fields)
    return buffer.getvalue()
