"""How a run stands: what its folder says of it, and the lines of its log one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, loss_terms, read_json

_KEPT = 512  # values of a trend, more than any terminal is wide
_FEW_EPOCHS = 4  # below that a trend by epoch shows nothing, so it goes by step
ACCURACIES = ("all", "many", "medium", "few")


@dataclass
class Activity:
    """What happens between epochs, such as an evaluation: `done` of `total` batches."""

    text: str
    total: int
    done: int = 0


@dataclass
class Standing:
    """What there is to be seen of a run. One thread feeds it while another draws: lists only grow at their end, dicts are replaced.

    Args:
        folder: of the run.
        title: method, backbone and data set.
        place: device and precision.
        epochs: of the whole run; 0 is unknown, as in all counts here.
        eval_every: epochs between evaluations.
        num_steps: of an epoch.
        epoch, step: epochs that are done, and steps of the one in progress.
        line: the newest step or epoch line, for its rates.
        terms: the newest loss terms, means over the steps since the line before.
        accuracies: percent on `split` after epoch `accuracies_of`, from 0; None for a group without classes.
        best: the highest accuracy over all classes so far, and its epoch from 0.
        device_memory_bytes, device_memory_total_bytes: held by the run, and there in all.
        device_busy_percent: of the device's time, None where nobody can tell.
        activity: between epochs.
        summary: of a run that is finished.
        stopped: why it ended before its time.
        broken: that was a loss that is not finite.
        log_every: steps between two lines.
        notice: a sentence for the dashboard's last line.
        age_s: seconds since the newest line, where another process writes them; what is left is that much less.
    """

    folder: str = ""
    title: str = ""
    place: str = ""
    epochs: int = 0
    eval_every: int = 1
    num_steps: int = 0
    epoch: int = 0
    step: int = 0
    line: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    accuracies: dict[str, float | None] = field(default_factory=dict)
    accuracies_of: int = -1
    split: str = ""
    best: tuple[float, int] | None = None
    device_memory_bytes: int = 0
    device_memory_total_bytes: int = 0
    device_busy_percent: int | None = None
    activity: Activity | None = None
    summary: dict[str, Any] | None = None
    stopped: str = ""
    broken: bool = False
    log_every: int = 1
    notice: str = ""
    age_s: float = 0.0
    _step_s: float = 0.0
    _epoch_s: float = 0.0
    _eval_s: float = 0.0
    _by_line: dict[str, list[float]] = field(default_factory=dict)
    _by_epoch: dict[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def of_folder(folder: Path) -> Standing:
        """At the beginning, of the run in `folder`.

        Raises:
            UserError: the folder holds no run.
        """
        config, environment = read_json(folder / CONFIG_FILE), read_json(folder / ENVIRONMENT_FILE)
        method = " ".join(filter(None, [config.get("loss", {}).get("name", ""), "stage two" if environment.get("stage") == 2 else ""]))
        ranks = environment.get("world_size", 1)
        place = [environment.get("gpu") or "CPU", environment.get("precision", ""), f"{ranks} ranks" if ranks > 1 else ""]
        return Standing(
            folder=str(folder),
            title=" · ".join(filter(None, [method, config.get("model", {}).get("arch", ""), config.get("dataset", "")])),
            place=", ".join(filter(None, place)),
            epochs=config["retrain"]["epochs"] if environment.get("stage") == 2 else config.get("epochs", 0),
            eval_every=config.get("eval_every", 1),
            log_every=config.get("log_every", 1),
            device_memory_total_bytes=environment.get("gpu_memory_bytes") or 0,
        )

    def feed(self, line: dict[str, Any]) -> None:
        """Takes in one line of the log; of kinds it does not know nothing."""
        kind = line.get("kind")
        if kind == "step":
            self._feed_step(line)
        elif kind == "epoch":
            self._feed_epoch(line)
        elif kind == "summary":
            self.summary, self.activity, self.epoch, self.step = line, None, self.epochs or self.epoch, 0
        elif kind == "broken":
            self.broken, self.stopped = True, f"the loss is not finite from step {line['step'] + 1} of epoch {line['epoch'] + 1} on"
        elif kind == "stopped":
            self.stopped = self.stopped or str(line.get("reason", "stopped"))

    def _feed_step(self, line: dict[str, Any]) -> None:
        self.epoch, self.step = line["epoch"], line["step"] + 1
        self._take_rates(line, self._by_line)
        if "epoch_s" in line:
            self._step_s = line["epoch_s"] / self.step

    def _feed_epoch(self, line: dict[str, Any]) -> None:
        if self.num_steps and "train_s" in line:
            self._step_s = line["train_s"] / self.num_steps
        self._epoch_s, self._eval_s = line.get("train_s", 0.0), line.get("eval_s", self._eval_s)
        self._take_rates(line, self._by_epoch)
        if line.get("all") is not None:
            self.accuracies, self.split = {name: line.get(name) for name in ACCURACIES}, line.get("split", "")
            self.accuracies_of = line["epoch"]
            if self.best is None or line["all"] > self.best[0]:
                self.best = (line["all"], line["epoch"])
            _append(self._by_epoch, {name: value for name, value in self.accuracies.items() if value is not None})
        self.epoch, self.step = line["epoch"] + 1, 0

    def _take_rates(self, line: dict[str, Any], series: dict[str, list[float]]) -> None:
        self.line, self.terms, self.age_s = line, loss_terms(line), 0.0
        self.epochs, self.num_steps = line.get("epochs", self.epochs), line.get("num_steps", self.num_steps)
        self.device_memory_bytes = line.get("device_memory_bytes", self.device_memory_bytes)
        _append(series, {**self.terms, **{name: line[name] for name in ("images_per_s", "data_wait_share") if name in line}})

    @property
    def line_s(self) -> float:
        """Seconds that may pass between two lines, as far as the lines so far say."""
        return max(self.log_every * self._step_s, self._eval_s)

    @property
    def by_step(self) -> bool:
        """Whether trends go by log line as long as there are only a few epochs."""
        return len(self._by_epoch.get("total", ())) < _FEW_EPOCHS

    def trend(self, name: str) -> Sequence[float]:
        """The values of a loss term, rate or accuracy so far, oldest first."""
        series = self._by_line if self.by_step and name not in ACCURACIES else self._by_epoch
        return series.get(name, ())

    @property
    def share_done(self) -> float:
        """Of the run's steps, 0…1."""
        within = min(1.0, self.step / self.num_steps) if self.num_steps else 0.0
        return min(1.0, (self.epoch + within) / self.epochs) if self.epochs else 0.0

    @property
    def epoch_left_s(self) -> float | None:
        """Seconds until the epoch in progress is trained, None where nothing is known."""
        if not (self.num_steps and self._step_s):
            return None
        return max(0.0, (self.num_steps - self.step) * self._step_s - self.age_s)

    @property
    def left_s(self) -> float | None:
        """Seconds until the last epoch is trained and evaluated, None where nothing is known."""
        if self.summary is not None:
            return 0.0
        epoch_s = self.num_steps * self._step_s or self._epoch_s
        if not (self.epochs and epoch_s):
            return None
        evaluations = sum((epoch + 1) % self.eval_every == 0 or epoch + 1 == self.epochs for epoch in range(self.epoch, self.epochs))
        train_s = (self.epochs - self.epoch) * epoch_s - self.step * self._step_s
        return max(0.0, train_s + evaluations * self._eval_s - self.age_s)


def _append(series: dict[str, list[float]], values: dict[str, Any]) -> None:
    for name, value in values.items():
        values_so_far = series.setdefault(name, [])
        values_so_far.append(float(value))
        del values_so_far[:-_KEPT]
