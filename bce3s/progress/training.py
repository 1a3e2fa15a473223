"""A run as it trains, for whoever looks: a dashboard, plain lines, or nothing but the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from bce3s.progress.dashboard import Dashboard
from bce3s.progress.device_load import DeviceLoad
from bce3s.progress.sentences import epoch_sentence, position_sentence
from bce3s.progress.standing import Activity, Standing

if TYPE_CHECKING:
    import torch

REFRESHES_PER_S = 2  # a picture costs a few milliseconds, which the step's thread must not miss
PLAIN_EVERY_S = 120.0  # so that the log of a cluster's job shows life in the middle of a long epoch


def is_live(console: Console) -> bool:
    """Whether a picture can be redrawn there: a terminal that can move its cursor. FORCE_COLOR makes no terminal of a pipe."""
    return console.is_interactive and not console.quiet and console.file.isatty()


class TrainingProgress:
    """Shows a `Standing`: fed with each line of the run's log, told of each step in between.

    Attributes:
        standing: what is shown; may be replaced by another run's.
    """

    def __init__(self, console: Console, standing: Standing, *, quiet: bool = False, device: torch.device | None = None) -> None:
        """Shows nothing until entered.

        Args:
            console: where.
            standing: of the run; its steps are counted here.
            quiet: say nothing at all.
            device: of the run in this process, whose load is shown.
        """
        self._console, self._quiet, self._load = console, quiet, DeviceLoad(device)
        self._dashboard = Dashboard(standing)
        self._is_live = is_live(console) and not quiet
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=REFRESHES_PER_S, transient=True, vertical_overflow="crop"
        )
        self._said_s = time.monotonic()

    @property
    def standing(self) -> Standing:
        """What is shown."""
        return self._dashboard.standing

    @standing.setter
    def standing(self, standing: Standing) -> None:
        self._dashboard.standing = standing

    def _draw(self) -> Group:
        self._load.update(self.standing)
        # The terminal writes ^C where the cursor is: behind a full line that would push the picture down, and its top would stay.
        return Group(self._dashboard, Text())

    def __enter__(self) -> TrainingProgress:
        """Starts the dashboard."""
        if self._is_live:
            self._console.control(Control(ControlType.CARRIAGE_RETURN))  # an early ^C stands there
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leaves the terminal as it was."""
        if self._is_live:
            self._live.stop()

    def advance(self, step: int) -> None:
        """So many steps of the epoch in progress are done. Costs next to nothing: the picture is drawn by another thread."""
        self._dashboard.standing.step = step

    def feed(self, line: dict[str, Any]) -> None:
        """One line of the log. An epoch's stays above the dashboard; elsewhere long epochs say now and then how far they are."""
        self.standing.feed(line)
        if line["kind"] == "epoch":
            self._say_epoch(line)
        elif line["kind"] == "step":
            self._say_where()

    def _say_where(self) -> None:
        if not self._is_live and time.monotonic() - self._said_s > PLAIN_EVERY_S:
            self._say(position_sentence(self.standing))

    def _say_epoch(self, line: dict[str, Any]) -> None:
        if not self._is_live:
            self._say(epoch_sentence(line, self.standing))
            return
        sentence = epoch_sentence(line, self.standing, with_time=False)
        if len(sentence) > self._console.width:  # the dashboard has the rates too
            sentence = epoch_sentence(line, self.standing, with_rates=False, with_time=False)
        self._console.print(sentence, highlight=False, no_wrap=True, overflow="crop")

    def _say(self, sentence: str) -> None:
        self._said_s = time.monotonic()
        if not self._quiet:
            self._console.print(sentence, highlight=False, soft_wrap=True)

    @contextmanager
    def activity(self, text: str, num_steps: int) -> Iterator[Callable[[], None]]:
        """What happens between epochs, such as an evaluation; yields the function that advances it."""
        activity = self.standing.activity = Activity(text, num_steps)

        def advance() -> None:
            activity.done += 1
            self._say_where()

        try:
            yield advance
        finally:
            self.standing.activity = None
