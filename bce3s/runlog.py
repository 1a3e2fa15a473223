"""The record of a run on disk: config.json, environment.json and metrics.jsonl, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.durable import write_atomically
from pipelines.types import UserError

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends to metrics.jsonl, line by line.

    Lines have a "kind": "step" (means since the line before), "epoch" (accuracies) or "summary".
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        """Opens the log of `folder`; lines of `first_epoch` and later, left by a run that died, are dropped."""
        path = folder / METRICS_FILE
        kept = read_metrics(folder) if first_epoch else []
        kept = [line for line in kept if line.get("epoch", first_epoch) < first_epoch]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> RunLog:
        """Use as a context manager, so that the file is closed."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics log, oldest first; a last line cut short by a kill is left out, a missing log is empty."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
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
            f"{path.parent} is not a run folder: it has no {path.name}; train first with 'bce3s fast-train --out {path.parent}'"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
