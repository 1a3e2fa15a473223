"""What `bce3s watch` does: finds the run, shows it as the training process would, and ends with it."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from bce3s.progress import Standing, TrainingProgress, is_live
from bce3s.progress.dashboard import Dashboard
from bce3s.progress.sentences import accuracy_words, position_sentence
from bce3s.runlog import ENVIRONMENT_FILE, METRICS_FILE
from bce3s.seeds import SEEDS_FILE
from bce3s.watch.follower import LogFollower
from pipelines.types import UserError

SILENT_S = 300.0
_SILENT_LINES = 5  # a run of slow steps is silent once this many lines are overdue
_SHOWN_EPOCHS = 5


class Watching:
    """Follows one run, or the runs of several seeds one after the other, by their files alone."""

    def __init__(self, folder: Path, console: Console) -> None:
        """Finds the run.

        Raises:
            UserError: there is none.
        """
        self._folder, self._console, self._live = folder, console, is_live(console)
        self._run = _newest_run(folder)
        self._begin(self._run)

    def _begin(self, run: Path) -> None:
        self._run, self._follower, self._standing = run, LogFollower(run), Standing.of_folder(run)
        self._has_said = False

    def show_once(self) -> int:
        """Prints how the run stands; the exit status."""
        for line in self._follower.read()[0]:
            self._standing.feed(line)
        standing = self._standing
        self._look_at_clock(say=False)
        if self._live:
            self._console.print(Dashboard(standing))
        elif standing.summary is None:
            self._say(f"{self._run}  {position_sentence(standing)}")
            if standing.accuracies:
                of = f"{standing.split}, epoch {standing.accuracies_of + 1}"
                self._say(f"top-1, % of {of}:  {'  '.join(accuracy_words(standing.accuracies))}")
            self._say(standing.notice)
        self._say(self._ending())
        return 1 if standing.broken else 0

    def follow(self, interval_s: float) -> int:
        """Until the run ends; 0 for one that is finished, 1 for one whose loss was not finite."""
        with TrainingProgress(self._console, self._standing) as progress:
            self._catch_up(progress)
            while True:
                status = self._status()
                if status is not None:
                    break
                time.sleep(interval_s)
                self._look(progress)
        if self._live:
            self._console.print(Dashboard(self._standing))
        self._say(self._ending())
        return status

    def _catch_up(self, progress: TrainingProgress) -> None:
        """What was there before: of its epochs, the last few stay above the picture."""
        lines = self._follower.read()[0]
        epochs = [number for number, line in enumerate(lines) if line["kind"] == "epoch"][-_SHOWN_EPOCHS:]
        self._say(f"following {self._run}")
        for number, line in enumerate(lines):
            feed = progress.feed if number in epochs else self._standing.feed
            feed(line)
        self._look_at_clock()

    def _look(self, progress: TrainingProgress) -> None:
        """What is new."""
        if self._standing.summary is not None:  # of one seed
            following = _newest_run(self._folder)
            if following != self._run:
                self._say(self._ending())
                self._begin(following)
                progress.standing = self._standing
                self._catch_up(progress)
                return
        lines, anew = self._follower.read()
        if anew:  # a continuation: its folder says what it is now
            self._standing = progress.standing = Standing.of_folder(self._run)
            for line in lines:
                self._standing.feed(line)
            self._say(f"the run goes on after {position_sentence(self._standing).partition('  loss')[0]}")
            lines = []
        for line in lines:
            progress.feed(line)
        if lines or anew:
            self._has_said = False
        self._look_at_clock()

    def _look_at_clock(self, *, say: bool = True) -> None:
        """Whether the run is still alive is told by its lines only: its process may be another machine's."""
        standing, silent_s = self._standing, self._follower.silent_s
        standing.age_s = silent_s
        if standing.broken:
            standing.notice = ""  # the last word says it
        elif standing.stopped:
            standing.notice = f"{standing.stopped}; --resume goes on from the last save"
        elif standing.summary is None and silent_s > max(SILENT_S, _SILENT_LINES * standing.line_s):
            standing.notice = f"no line for {silent_s / 60:.0f} min; the process may be gone"
        else:
            standing.notice = ""
        if standing.notice and say and not self._live and not self._has_said:
            self._has_said = True
            self._say(standing.notice)

    def _status(self) -> int | None:
        """To exit with; None as long as something may come."""
        if self._standing.broken:
            return 1
        if self._standing.summary is None:
            return None
        is_one = self._run == self._folder
        return 0 if is_one or (_has_ended(self._folder, self._run) and _newest_run(self._folder) == self._run) else None

    def _ending(self) -> str:
        standing = self._standing
        if standing.summary is None:
            return standing.stopped if standing.broken else ""
        name, split = standing.summary.get("headline", "last_epoch_no_tta"), standing.summary.get("split", "test")
        words = "  ".join(accuracy_words(standing.summary.get(name, {})))
        return f"finished: {self._run}  {name.replace('_', ' ').replace('tta', 'TTA')}, % of {split}:  {words}"

    def _say(self, sentence: str) -> None:
        if sentence:
            self._console.print(sentence, highlight=False, soft_wrap=True)


def _newest_run(folder: Path) -> Path:
    """`folder`, or of the runs of several seeds in it the one that was written to last."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of a run, such as {folder.parent}")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name that of a run, or start one with 'bce3s fast-train --out {folder}'")
    if (folder / ENVIRONMENT_FILE).is_file():  # written behind the config
        return folder
    runs = [path.parent for path in folder.glob(f"s*/{ENVIRONMENT_FILE}") if path.parent.name[1:].isdecimal()]
    if not runs:
        others = sorted(path.parent.name for path in folder.glob(f"*/{ENVIRONMENT_FILE}"))
        if others:
            raise UserError(f"{folder} is no run folder but holds {len(others)}; name one, as in 'bce3s watch {folder / others[0]}'")
        raise UserError(f"{folder} holds no run yet: it has no {ENVIRONMENT_FILE}; start one with 'bce3s fast-train --out {folder}'")
    return max(runs, key=_written_s)


def _written_s(run: Path) -> float:
    paths = [path for path in (run / METRICS_FILE, run / ENVIRONMENT_FILE) if path.is_file()]
    return max(path.stat().st_mtime for path in paths)


def _has_ended(folder: Path, run: Path) -> bool:
    """Whether the figures of all seeds were written after the run's last line."""
    path = folder / SEEDS_FILE
    return path.is_file() and path.stat().st_mtime >= (run / METRICS_FILE).stat().st_mtime
