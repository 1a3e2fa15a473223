"""Saves checkpoints beside the training, in a thread of their own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bce3s.checkpoint.file import NotFinite, write_snapshot
from bce3s.checkpoint.folder import CheckpointFolder
from bce3s.checkpoint.snapshot import Snapshot, Staging
from bce3s.checkpoint.tree import take_apart
from pipelines.types import UserError


class CheckpointWriter:
    """Takes snapshots of a state and saves them while the training goes on.

    Threads: every method is called by the thread that trains. Each save is a thread of its own, which touches the snapshot, the folder
    and nothing of the model. It is no daemon, so that a program which ends, by an error or Ctrl-C too, first finishes the save under way;
    a kill leaves the files of before, and at most a temporary that the next run removes. It computes and writes outside the GIL.

    Memory: once the size of the largest state (and of what is saved with it) stays taken on the host, locked where the state is on a GPU.

    Args:
        folder: where checkpoints go; nothing else saves into it meanwhile.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._staging = Staging(pinned=True)
        self._thread: threading.Thread | None = None
        self._failures: deque[str] = deque()  # appended there, emptied here

    @property
    def busy(self) -> bool:
        """Whether the save before is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, step: int, state: dict[str, Any], also: Mapping[Path, dict[str, Any]] | None = None) -> bool:
        """Takes `state` as it is now, after `step` steps, and begins to save it; returns False and does nothing while `busy`.

        The caller may update the tensors at once, on the GPU in the streams that are current now (others wait for these first).
        Nothing is saved unless every float and floating tensor is finite; whether it was, and whether the disk took it, `failures` says.

        Args:
            also: path -> state of further files, each saved before the checkpoint, so that what it says of them is true.

        Raises:
            TypeError: a state holds what no checkpoint can hold.
        """
        if self.busy:
            return False
        paths: list[Path | None] = [*(also or {}), None]
        states = [*(also or {}).values(), state]
        work = list(zip(paths, self._staging.take([take_apart(each) for each in states]), strict=True))
        self._thread = threading.Thread(target=self._save, args=(step, work), name=f"checkpoint-{step}", daemon=False)
        self._thread.start()
        return True

    def failures(self) -> list[str]:
        """Of each save that failed since the last call, the sentence that says why; what was there before still stands."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def wait(self) -> None:
        """Until nothing is being saved."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Finishes the save under way and frees the memory; `failures` can still be asked."""
        self.wait()
        self._staging.free()

    def _save(self, step: int, work: list[tuple[Path | None, Snapshot]]) -> None:
        try:
            for path, snapshot in work:
                _require_finite(step, path, snapshot)
            self._folder.prepare()
            for path, snapshot in work:
                if path is None:
                    self._folder.publish(step, snapshot)
                else:
                    write_snapshot(path, snapshot)
        except UserError as error:
            self._failures.append(str(error))
        except Exception as error:  # a thread's traceback would be printed once and forgotten; the training must hear of it
            self._failures.append(f"step {step} was not saved: {type(error).__name__}: {error}")


def _require_finite(step: int, path: Path | None, snapshot: Snapshot) -> None:
    snapshot.wait()
    name = snapshot.first_not_finite()
    if name is not None:
        where = f" (for {path})" if path else ""
        raise NotFinite(f"step {step} was not saved: {name}{where} is not finite; the checkpoint before still stands")
