"""What a run tells while it trains: its log, and who follows it: the dashboard, and a tracker."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bce3s.progress import Standing, TrainingProgress
from bce3s.progress.device_load import memory_bytes
from bce3s.runlog import RunLog, read_metrics
from bce3s.trackers import followed
from bce3s.train.state import Cursor

VIEWS_PER_IMAGE = {"mixed": 3, "pair": 2}  # by `Loss.views`


@dataclass(frozen=True, kw_only=True)
class Telling:
    """How a run is told of.

    Args:
        quiet: only what went wrong; whoever started it prints the result.
        tracker: name in `bce3s.trackers.TRACKERS`, or "none".
        command: that started it, for its record.
    """

    quiet: bool = False
    tracker: str = "none"
    command: str = ""


SPOKEN = Telling()


@contextmanager
def told(
    folder: Path | None,
    cursor: Cursor,
    num_steps: int,
    telling: Telling,
    console: Console,
    complain: Callable[[str], None],
    device: torch.device,
) -> Iterator[tuple[RunLog, TrainingProgress]]:
    """Opens the log at `cursor` and shows what goes into it; a run that does not come to its end says why in its last line.

    Args:
        folder: of the run, with its record; None in a rank that writes nothing.
        cursor: how far the run is; read again when it ends.
        num_steps: of an epoch.
        telling: how.
        console: where.
        complain: says what went wrong.
        device: of the run.

    Raises:
        UserError: the tracker cannot begin.
    """
    standing = Standing() if folder is None else Standing.of_folder(folder)
    standing.num_steps = num_steps
    with RunLog(folder, cursor.epoch, cursor.step, complain) as log:
        for line in [] if folder is None else read_metrics(folder):
            standing.feed(line)
        standing.epoch, standing.step = cursor.epoch, cursor.step
        with (
            TrainingProgress(console, standing, quiet=telling.quiet, device=device) as progress,
            followed("none" if folder is None else telling.tracker, folder or Path(), cursor.global_step, complain) as feeds,
        ):
            log.listeners = (progress.feed, *feeds)
            try:
                yield log, progress
            except BaseException as error:
                if not standing.broken:  # that line says it all
                    reason = " ".join(str(error).split())[:500] or type(error).__name__
                    with contextlib.suppress(OSError):  # the disk may be what ended it
                        log.write({"kind": "stopped", "epoch": cursor.epoch, "step": cursor.step, "reason": reason})
                raise


def step_line(cursor: Cursor, epochs: int, num_steps: int, rates: dict[str, float], views: str, device: torch.device) -> dict[str, Any]:
    """The head of a log line, means since the line before.

    Args:
        cursor: just behind the step.
        epochs: of the run.
        num_steps: of an epoch.
        rates: "images_per_s" of source images, and of waiting for data.
        views: `Loss.views`.
        device: of the run; its memory is told where it is a GPU.
    """
    where = {"epoch": cursor.epoch, "step": cursor.step - 1, "num_steps": num_steps, "epochs": epochs, "epoch_s": cursor.epoch_s}
    return {"kind": "step", **where, **_with_views(rates, views), **memory_bytes(device)}


def epoch_line(cursor: Cursor, epochs: int, num_steps: int, rates: dict[str, float], views: str) -> dict[str, Any]:
    """The head of the log line of an epoch that is trained, means over all of it; arguments as of `step_line`."""
    where = {"epoch": cursor.epoch, "num_steps": num_steps, "epochs": epochs, "train_s": cursor.epoch_s}
    return {"kind": "epoch", **where, **_with_views(rates, views)}


def _with_views(rates: dict[str, float], views: str) -> dict[str, float]:
    return {**rates, "views_per_s": rates["images_per_s"] * VIEWS_PER_IMAGE[views]}
