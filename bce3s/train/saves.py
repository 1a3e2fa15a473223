"""When a run is saved, and what is done about saves that fail: training goes on, loudly."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from bce3s.checkpoint import CheckpointFolder, CheckpointWriter
from bce3s.config import CheckpointConfig, parse_interval
from bce3s.distributed import World
from bce3s.train.build import BEST_CHECKPOINT
from bce3s.train.state import Cursor, RunState

clock_s = time.monotonic


class Saves:
    """The checkpoints of one run: due by the clock, by steps or by epochs, written in the background by the main rank.

    Attributes:
        folder: where they lie.
    """

    def __init__(self, run: Path, config: CheckpointConfig, state: RunState, world: World, say: Callable[[str], None]) -> None:
        """Begins counting now; `say` shows a person a sentence."""
        self.folder = CheckpointFolder(run, config.keep)
        self._best_path = run / BEST_CHECKPOINT
        self._interval = parse_interval(config.every)
        self._state, self._world, self._say = state, world, say
        self._writer = CheckpointWriter(self.folder) if world.is_main else None
        self._best: dict[str, Any] | None = None
        self._best_is_saved = False
        self.begin()

    def begin(self) -> None:
        """Counts from where the run is now."""
        cursor = self._state.cursor
        self._saved_epoch, self._saved_step, self._saved_s = cursor.epoch, cursor.global_step, clock_s()
        self.forget_asking()

    def forget_asking(self) -> None:
        """The answer will not come."""
        self._asked = False

    @property
    def due(self) -> bool:
        """Whether this rank, if it is the main one, would save now: the interval is over, and the save before is on disk."""
        return self._writer is not None and self._is_over(self._state.cursor) and not self._writer.busy

    def ask(self) -> bool:
        """`due`, once: the ranks' answer comes a step later, and must not be asked for twice."""
        self.report()
        wanted = self.due and not self._asked
        self._asked = self._asked or wanted
        return wanted

    def _is_over(self, cursor: Cursor) -> bool:
        passed = {
            "epoch": cursor.epoch - self._saved_epoch,
            "step": cursor.global_step - self._saved_step,
            "s": clock_s() - self._saved_s,
        }
        return passed[self._interval.unit] >= self._interval.count

    def keep_best(self) -> None:
        """Remembers the weights as they are; they are written with the next save, so that the two always belong together."""
        if self._writer is not None:
            state = self._state.weights_dict()
            self._best = {**state, "model": {name: value.detach().clone() for name, value in state["model"].items()}}
            self._best_is_saved = False

    def best_weights(self) -> dict[str, Tensor] | None:
        """Those of the best epoch, if that lies in this process's part of the run; on the main rank."""
        return None if self._best is None else self._best["model"]

    def save(self) -> None:
        """Takes a snapshot and has it written; all ranks call it together, once the main one was `due`."""
        with self._state.rank_average() as statistics_WR:
            state = {**self._state.state_dict(), "rank_statistics": statistics_WR}
            if self._writer is not None:
                also = {} if self._best is None or self._best_is_saved else {self._best_path: self._best}
                self._writer.submit(self._state.cursor.global_step, state, also)
                self._best_is_saved = self._best is not None  # unless `report` hears otherwise
                self.begin()
        self.report()

    def save_and_wait(self) -> list[str]:
        """Like `save`, once the save before is done, and returns when this one is too: why it does not stand, nothing if it does."""
        if self._writer is not None:
            self._writer.wait()
            self.report()
        self.save()
        if self._writer is None:
            return []
        self._writer.wait()
        return self.report()

    def report(self) -> list[str]:
        """Tells a person of saves that failed since the last call; returns the sentences."""
        failures = self._writer.failures() if self._writer is not None else []
        for sentence in failures:
            self._best_is_saved = False
            self._say(f"NOT SAVED: {sentence}; training goes on")
        return failures

    def close(self) -> None:
        """Waits for what is being written."""
        if self._writer is not None:
            self._writer.close()
            self.report()
