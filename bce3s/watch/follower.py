"""Reads a log that another process writes: only what is new, and all of it again where it was rewritten."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bce3s.runlog import METRICS_FILE

_REMEMBERED_BYTES = 256  # a line says its epoch, step and losses within that


@dataclass
class LogFollower:
    """The lines of one run's metrics.jsonl as they come.

    A continuation drops lines and writes the file anew, perhaps as long as before: what precedes the new lines must be what was read.

    Args:
        folder: of the run.
    """

    folder: Path
    _offset: int = 0
    _before: bytes = b""
    _grew_s: float = field(default_factory=time.monotonic)

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole lines since the last call, and whether they begin anew, so that earlier ones are void. A missing log has none."""
        try:
            with (self.folder / METRICS_FILE).open("rb") as file:
                file.seek(self._offset - len(self._before))
                content = file.read()
                modified_s = os.fstat(file.fileno()).st_mtime
                anew = not content.startswith(self._before)
                if anew:
                    file.seek(0)
                    content = file.read()
        except FileNotFoundError:
            return [], self._begin()
        if anew:
            self._begin()
        is_first, content = not self._offset, content[len(self._before) :]
        whole = content[: content.rfind(b"\n") + 1]  # the rest of a line is still to come
        if not whole:
            return [], anew
        # By this machine's clock, but for what was there before: another machine's may go wrong by minutes.
        self._grew_s = time.monotonic() - (max(0.0, time.time() - modified_s) if is_first and not anew else 0.0)
        self._offset += len(whole)
        self._before = (self._before + whole)[-_REMEMBERED_BYTES:]
        return [line for text in whole.splitlines() for line in _parsed(text)], anew

    def _begin(self) -> bool:
        """From the start of the file; whether anything had been read."""
        had_read, self._offset, self._before = self._offset > 0, 0, b""
        return had_read

    @property
    def silent_s(self) -> float:
        """Seconds since the last line came; of a log that has none, since this began to look."""
        return time.monotonic() - self._grew_s


def _parsed(text: bytes) -> list[dict[str, Any]]:
    """The line, or nothing of one that is damaged: a continuation writes it anew."""
    try:
        line = json.loads(text)
    except ValueError:
        return []
    return [line] if isinstance(line, dict) and "kind" in line else []
