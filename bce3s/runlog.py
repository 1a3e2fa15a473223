"""The record of a run on disk: config.json, environment.json and metrics.jsonl, one JSON object a line."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.durable import write_atomically
from pipelines.types import UserError

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
# What a line says beside the terms of its loss; figures with a unit are known by it.
_NO_TERMS = {"kind", "epoch", "epochs", "step", "num_steps", "split", "all", "many", "medium", "few", "balanced", "ece"}
_UNITS = ("_s", "_share", "_bytes", "_size")


class RunLog:
    """Appends to metrics.jsonl, line by line. A disk that is full does not end a run: its lines wait for room.

    Lines have a "kind": "step" (means since the line before), "epoch" (accuracies), "broken" (where a loss was not finite), "stopped" (the
    run ended before its time, and why) or "summary".

    Attributes:
        listeners: called with every line after it was written; they must not raise.
    """

    def __init__(self, folder: Path | None, epoch: int, step: int, complain: Callable[[str], None]) -> None:
        """Opens the log of `folder`, or none at all; lines from `step` of `epoch` on, left by a run that died, are dropped.

        Args:
            folder: of the run; None keeps no log.
            epoch, step: done so far.
            complain: told once when lines cannot be written.
        """
        self._complain, self._waiting, self._path = complain, "", None if folder is None else folder / METRICS_FILE
        self._complained = False
        self.listeners: Sequence[Callable[[dict[str, Any]], None]] = ()
        if folder is None or self._path is None:
            return
        kept = [line for line in read_metrics(folder) if _is_before(line, epoch, step)] if epoch or step else []
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self._path.open("ab", buffering=0)

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line, or keeps it until there is room; then tells the listeners."""
        if self._path is None:
            return
        self._append(line)
        for listen in self.listeners:
            listen(line)

    def _append(self, line: dict[str, Any]) -> None:
        self._waiting += json.dumps(line, allow_nan=False) + "\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(self._waiting.encode()) < len(self._waiting.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting = ""
        except OSError as error:
            self._file.truncate(end)  # half a line would hide all that follow it
            if not self._complained:
                self._complained = True
                self._complain(
                    f"NOT LOGGED: {self._path} cannot be written ({error.strerror}); its lines wait for room, and training goes on"
                )

    def __enter__(self) -> RunLog:
        """Use as a context manager, so that the file is closed."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes the file; lines that still find no room are lost, which `complete` says."""
        if self._path is not None:
            self._file.close()

    @property
    def complete(self) -> bool:
        """Whether every line is on disk."""
        return not self._waiting


def _is_before(line: dict[str, Any], epoch: int, step: int) -> bool:
    """Whether a log line is of what was done before `step` of `epoch`; a summary and a stop never are."""
    return (line.get("epoch", math.inf), line.get("step", -1) + 1 if line["kind"] == "step" else math.inf) <= (epoch, step)


def loss_terms(line: dict[str, Any]) -> dict[str, float]:
    """The loss terms of a step or epoch line, "total" among them."""
    names = [name for name in line if name not in _NO_TERMS and not name.endswith(_UNITS)]
    return {name: line[name] for name in names if isinstance(line[name], (int, float))}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics log, oldest first; a last line cut short by a kill is left out, a missing log is empty."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or "kind" not in line:
            break
        lines.append(line)
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object of a run folder.

    Raises:
        UserError: missing or damaged; names the path.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} is not a run folder: it has no {path.name}; train first with "
            f"'bce3s fast-train --dataset NAME --out {path.parent}'"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
