"""What a person sees while a run trains: a live bar on a terminal, one plain line an epoch elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from bce3s.metrics import Accuracy, format_percent

SHOWN_TERMS = ("total", "joint", "contrastive", "uniform")
SHOWN_ACCURACIES = ("all", "many", "medium", "few")


class TrainingProgress:
    """Progress of all epochs in one bar: epoch, images/s, data-wait share, loss terms, last accuracy, time left."""

    def __init__(self, console: Console, epochs: int, num_steps: int, steps_done: int) -> None:
        """Shows nothing until entered."""
        self._console, self._epochs, self._first_epoch = console, epochs, steps_done / num_steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # Last, so that a narrow terminal cuts it short instead of breaking the line.
            TextColumn(
                "{task.fields[rates]}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=max(16, console.width - 56))
            ),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=epochs * num_steps, completed=steps_done, rates="")
        self._started_s = time.perf_counter()

    def __enter__(self) -> TrainingProgress:
        """Starts the bar."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leaves the terminal as it was."""
        self._progress.stop()

    def advance(self, epoch: int) -> None:
        """One step of `epoch` is done."""
        self._progress.update(self._task, advance=1, description=f"epoch {epoch + 1}/{self._epochs}")

    def show_rates(self, images_per_s: float, data_wait_share: float, terms: dict[str, float]) -> None:
        """Means since the last call."""
        losses = " ".join(f"{name} {terms[name]:.2f}" for name in SHOWN_TERMS if name in terms)
        self._progress.update(self._task, rates=f"{images_per_s:.0f} source images/s, data wait {data_wait_share:.0%}, {losses}")

    @contextmanager
    def activity(self, text: str, num_steps: int) -> Iterator[Callable[[], None]]:
        """A second bar for what happens between epochs, such as an evaluation; yields the function that advances it."""
        task = self._progress.add_task(text, total=num_steps, rates="")
        try:
            yield lambda: self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def show_epoch(self, epoch: int, line: dict[str, Any], accuracy: Accuracy | None) -> None:
        """A line that stays, above the bar."""
        parts = [f"epoch {epoch + 1:>3}/{self._epochs}", f"loss {line['total']:.3f}", f"{line['images_per_s']:.0f} source images/s"]
        parts.append(f"data wait {line['data_wait_share']:.0%}")
        if accuracy is not None:
            parts += [f"{name} {format_percent(value)}" for name, value in accuracy.headline().items() if name in SHOWN_ACCURACIES]
        if not self._console.is_terminal:
            left_s = (time.perf_counter() - self._started_s) / max(epoch + 1 - self._first_epoch, 0.01) * (self._epochs - epoch - 1)
            parts.append(f"{left_s:.0f} s left")
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)


def accuracy_table(title: str, rows: dict[str, Accuracy], caption: str) -> Table:
    """Accuracies by shot group and calibration error, one row a measurement; the first row is the headline."""
    measured = next((accuracy.calibration for accuracy in rows.values() if accuracy.calibration is not None), None)
    if measured is not None:
        caption += f"; ECE: {len(measured.bin_counts)} bins, confidence is the largest {measured.confidence}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("top-1 accuracy, %")
    for name in (*SHOWN_ACCURACIES, "ECE"):
        table.add_column(name, justify="right")
    for position, (name, accuracy) in enumerate(rows.items()):
        figures = accuracy.headline()
        values = [format_percent(figures[group]) for group in (*SHOWN_ACCURACIES, "ece")]
        table.add_row(name, *values, style="bold" if position == 0 else None)
    return table
