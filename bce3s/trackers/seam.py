"""What every tracker is given, which there are, and how one that fails is let go without the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from bce3s.runlog import CONFIG_FILE, loss_terms, read_json, read_metrics
from pipelines.config import require_choice
from pipelines.types import BackendError

TRACKERS: dict[str, str] = {
    "tensorboard": "bce3s.trackers.tensorboard:TensorBoardTracker",
    "wandb": "bce3s.trackers.wandb:WandbTracker",
}
NONE = "none"
_RATES = ("images_per_s", "views_per_s", "data_wait_share", "ready_share", "device_memory_bytes", "train_s", "eval_s")
_ACCURACIES = ("all", "many", "medium", "few", "balanced", "ece")


class Tracker(Protocol):
    """One run at a tracker. Anything may raise: whoever calls knows what to do."""

    def __init__(self, folder: Path, config: dict[str, Any], steps_done: int) -> None:
        """Begins the run in `folder`, or goes on with it after `steps_done` steps.

        Raises:
            BackendError: it cannot begin; one sentence.
        """
        ...

    def write(self, figures: dict[str, float], step: int) -> None:
        """Figures by name, such as "loss/total", after so many steps of the run."""
        ...

    def finish(self, figures: dict[str, float]) -> None:
        """The result, of a run that came to its end."""
        ...

    def close(self, *, well: bool) -> None:
        """Nothing follows; `well` says that no error ended the run."""
        ...


def require_tracker(name: str) -> None:
    """Raises unless the tracker `name` can be used; to be asked before anything is trained.

    Raises:
        ConfigError: unknown name; lists the known ones.
        BackendError: its package is missing; names the line that installs it.
    """
    require_choice("log", name, (NONE, *TRACKERS))
    if name == NONE:
        return
    found = find_spec(name)
    if found is None or found.origin is None:  # a folder ./wandb of an earlier run is no package
        raise BackendError(f"--log {name} needs the package {name}: pip install 'bce3s[{name}]'")


@dataclass
class Following:
    """Hands the lines of a log to a tracker, until that fails: then it says so once, and the run goes on without."""

    name: str
    tracker: Tracker
    complain: Callable[[str], None]
    _num_steps: int = 1
    _has_failed: bool = field(default=False)

    def feed(self, line: dict[str, Any]) -> None:
        """One line of the log."""
        self._num_steps = line.get("num_steps", self._num_steps)
        if line["kind"] == "step":
            step = line["epoch"] * self._num_steps + line["step"] + 1
            self._try(lambda: self.tracker.write({"epoch": step / self._num_steps, **_figures(line, "loss", "rate")}, step))
        elif line["kind"] == "epoch":
            step = (line["epoch"] + 1) * self._num_steps
            self._try(lambda: self.tracker.write(_figures(line, "epoch loss", "epoch rate"), step))
        elif line["kind"] == "summary":
            self._try(lambda: self.tracker.finish(_result(line)))

    def close(self, *, well: bool) -> None:
        """Nothing follows."""
        self._try(lambda: self.tracker.close(well=well))

    def _try(self, action: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            action()
        except Exception as error:  # a library's network, disk or service: none of it is worth a run
            self._has_failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            self.complain(f"NOT TRACKED: --log {self.name} failed ({reason}) and is off from here on; metrics.jsonl has every line")


def _figures(line: dict[str, Any], losses: str, rates: str) -> dict[str, float]:
    """By name, in groups."""
    split = line.get("split", "")
    figures = {f"{losses}/{name}": value for name, value in loss_terms(line).items()}
    figures |= {f"{rates}/{name}": line[name] for name in _RATES if line.get(name) is not None}
    return figures | {f"{split}/{name}": line[name] for name in _ACCURACIES if line.get(name) is not None}


def _result(line: dict[str, Any]) -> dict[str, float]:
    """The headline of a summary, by name; of an older one the last epoch's figures."""
    measure = line.get(line.get("headline", "last_epoch_no_tta"), {})
    return {f"result/{name}": measure[name] for name in _ACCURACIES if measure.get(name) is not None}


@contextmanager
def followed(name: str, folder: Path, steps_done: int, complain: Callable[[str], None]) -> Iterator[list[Callable[[dict[str, Any]], None]]]:
    """Inside, what the yielded functions are fed with goes to the tracker `name`; "none" has no function.

    Args:
        name: in `TRACKERS`, or "none".
        folder: of the run; its config.json is told to the tracker.
        steps_done: steps of the run that are done; later figures of an earlier try are to be forgotten.
        complain: told once when the tracker fails.

    Raises:
        UserError: the tracker cannot begin.
    """
    if name == NONE:
        yield []
        return
    require_tracker(name)
    module_name, class_name = TRACKERS[name].split(":")
    kind: type[Tracker] = getattr(import_module(module_name), class_name)
    following = Following(name, kind(folder, read_json(folder / CONFIG_FILE), steps_done), complain)
    well = False
    try:
        yield [following.feed]
        well = True
    finally:
        following.close(well=well)


def follow_finished(name: str, folder: Path, complain: Callable[[str], None]) -> None:
    """Hands a run that lies finished in `folder` to the tracker `name`, all lines at once.

    Raises:
        UserError: the tracker cannot begin.
    """
    with followed(name, folder, 0, complain) as feeds:
        for line in read_metrics(folder) if feeds else []:
            for feed in feeds:
                feed(line)
