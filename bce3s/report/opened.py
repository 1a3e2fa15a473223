"""One run of a report with what belongs to it: its record, its shards, its network, and notes on what of these is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bce3s.report.findings import Measured, Note
from bce3s.report.measure import measure_classifier, measure_network, report_split
from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, read_json, read_metrics
from bce3s.seeds import is_finished
from bce3s.train import TrainedNetwork, open_network, shards_of
from pipelines.format import ShardSet
from pipelines.types import UserError


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a report was asked for.

    Args:
        model: also measure with the runs' networks.
        shards: of every run; None is what each was trained on.
        checkpoint: "last" or "best"; None is whichever is a run's result.
        device: "auto", "cpu", "cuda" or "cuda:N".
        on_open: told the root of shards before their images are read.
        on_step: told after each batch the run's name, and how many of how many batches are done.
    """

    model: bool = True
    shards: str | None = None
    checkpoint: str | None = None
    device: str = "auto"
    on_open: Callable[[Path | str], None] = field(default=lambda root: None)
    on_step: Callable[[str, int, int], None] = field(default=lambda name, done, total: None)


class OpenedRun:
    """One run, as it is read.

    Attributes:
        folder: of the run.
        name: its label.
        config, environment: its record; a run that died right after it began may have no environment.
        lines: of its log.
        summary: the last line; empty where it has not ended.
        notes: on what is missing; they gather on the way.
        shards: its own; None where they are gone, or are others now.
        network: None where it is gone, or not asked for. Without shards it is read all the same: it alone knows the classes then.
    """

    def __init__(self, folder: Path, name: str, asked: Asked, given: ShardSet | None) -> None:
        """Reads the record and opens shards and network.

        Args:
            folder: of the run.
            name: its label.
            asked: what to measure, with what.
            given: shards to take in place of those that the run names.

        Raises:
            UserError: its record is damaged.
        """
        self.folder, self.name, self.asked = folder, name, asked
        has_environment = (folder / ENVIRONMENT_FILE).is_file()
        self.config: dict[str, Any] = read_json(folder / CONFIG_FILE)
        self.environment: dict[str, Any] = read_json(folder / ENVIRONMENT_FILE) if has_environment else {}
        self.lines = read_metrics(folder)
        self.summary: dict[str, Any] = self.lines[-1] if is_finished(folder) else {}
        self.notes: list[Note] = []
        self.shards = self._shards(given)
        self.network = self._network()

    def note(self, section: str, sentence: str) -> None:
        """Keeps a note."""
        self.notes.append(Note(section=section, sentence=sentence))

    def measure(self) -> Measured | None:
        """With the network, where there is one: all, or without shards the classifier alone."""
        if self.network is None or not self.asked.model:
            return None
        if self.shards is None:
            return measure_classifier(self.network)
        try:
            self.asked.on_open(self.shards.root)
            return measure_network(
                *(self.network, self.shards),
                split=self.summary.get("split") or report_split(self.shards),
                on_step=lambda done, total: self.asked.on_step(self.name, done, total),
                say=self.notes.append,
            )
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            self._without_pass(_reason(error, self.asked.device))
            return measure_classifier(self.network, self.shards)

    def _shards(self, given: ShardSet | None) -> ShardSet | None:
        """Those of the run; None with a note where they are gone, or are others now."""
        try:
            found = given or shards_of(self.folder, None)
        except UserError as error:
            self._without_pass(str(error))
            return None
        if "fingerprint" not in self.environment:
            self._without_pass(f"{self.name} died before it recorded which shards it trains on")
            return None
        if found.fingerprint != self.environment["fingerprint"]:
            self._without_pass(f"the shards at {found.address} are not those that {self.name} was trained on")
            return None
        return found

    def _without_pass(self, reason: str) -> None:
        if self.asked.model:
            self.note("confusions", f"Not measured: {reason}.")

    def _network(self) -> TrainedNetwork | None:
        """None with a note where there is none, or it was not asked for. Without shards it alone knows the classes."""
        if not self.asked.model:
            self.note("confusions", "Not measured: it was asked for without the model.")
            self.note("classifier", "Not measured: it was asked for without the model.")
            if self.shards is not None:
                return None
        try:
            network = open_network(self.folder, self.asked.checkpoint, self.asked.device if self.asked.model else "cpu")
        except (UserError, torch.OutOfMemoryError) as error:
            if self.asked.model:
                self.note("classifier", f"Not measured: {_reason(error, self.asked.device)}.")
                self.note("confusions", f"Not measured: {_reason(error, self.asked.device)}.")
            return None
        for sentence in network.skipped:
            self.note("headline", f"{sentence}; the one before was taken.")
        return network


def _reason(error: BaseException, device: str) -> str:
    return f"device {device} ran out of memory; take --device cpu" if isinstance(error, torch.OutOfMemoryError) else str(error)
