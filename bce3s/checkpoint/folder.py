"""The checkpoints of one run: the newest few, named by their step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bce3s.checkpoint.file import CheckpointError, load_checkpoint, write_snapshot
from bce3s.checkpoint.snapshot import Snapshot, Staging
from bce3s.checkpoint.tree import take_apart
from pipelines.durable import sync_folder

CHECKPOINTS_FOLDER = "checkpoints"
_STEP_FILE = re.compile(r"step-(\d{8,})\.safetensors")
_TEMPORARIES = "*.safetensors.partial"


@dataclass(frozen=True)
class Loaded:
    """What `load_newest` found.

    Args:
        state: as it was saved.
        path: where it lay.
        skipped: of each newer checkpoint that could not be loaded, the sentence that says why, newest first.
    """

    state: dict[str, Any]
    path: Path
    skipped: tuple[str, ...]


class CheckpointFolder:
    """The checkpoints `checkpoints/step-00001234.safetensors` of a run, by the number of steps done.

    One process may save into it while others read: to look into it changes nothing. What a killed process left half written goes with
    the first save or `clear`. A save deletes what has more steps: a past that was given up, which the next resume must not prefer.

    Args:
        run: the run's folder; need not exist before the first save.
        keep: how many of the newest stay, at least 1.
    """

    def __init__(self, run: Path, keep: int) -> None:
        assert keep >= 1
        self._run = run
        self._keep = keep
        self._path = run / CHECKPOINTS_FOLDER
        self._swept = False

    def newest(self) -> Path | None:
        """The path of the checkpoint with the most steps, None where there is none; it may be damaged."""
        paths = self._by_step()
        return paths[max(paths)] if paths else None

    def load_newest(self, device: torch.device) -> Loaded | None:
        """The newest checkpoint that is whole, its tensors on `device`; None where there is none at all.

        Raises:
            CheckpointError: there are some and none can be loaded.
        """
        tried: set[int] = set()
        skipped: list[str] = []
        # Listed anew each time: a training beside this may have put a newer one in the place of the one that was just listed.
        while untried := self._by_step().keys() - tried:
            step = max(untried)
            tried.add(step)
            path = self._path_of(step)
            try:
                return Loaded(load_checkpoint(path, device), path, tuple(skipped))
            except CheckpointError as error:
                if path.exists():
                    skipped.append(str(error))
        if skipped:
            raise CheckpointError(f"no checkpoint in {self._path} can be loaded: {'; '.join(skipped)}")
        return None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Saves `state` after `step` steps, then deletes what is not among the newest.

        Raises:
            CheckpointError, TypeError: as `save_checkpoint`; every earlier checkpoint still stands.
        """
        self.publish(step, Staging().take([take_apart(state)])[0])

    def prepare(self) -> None:
        """Makes the folder where it is not there, and removes what a killed process left half written.

        Raises:
            CheckpointError: the disk is read-only, or the like.
        """
        with _sentences_of(f"cannot save into {self._path}"):
            if not self._path.is_dir():
                self._path.mkdir(parents=True)
                sync_folder(self._run)
            self._sweep()

    def publish(self, step: int, snapshot: Snapshot) -> None:
        """`save` of a state that was taken before."""
        self.prepare()
        path = self._path_of(step)
        write_snapshot(path, snapshot)
        with _sentences_of(f"{path} is saved, but older ones cannot be deleted"):
            steps = sorted(self._by_step())
            earlier = [other for other in steps if other <= step]
            for other in {*steps} - {*earlier[-self._keep :]}:
                self._path_of(other).unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes every checkpoint of a run that is being overwritten.

        Raises:
            CheckpointError: one cannot be deleted.
        """
        if not self._path.is_dir():
            return
        with _sentences_of(f"cannot empty {self._path}"):
            self._sweep()
            for path in self._by_step().values():
                path.unlink(missing_ok=True)
            sync_folder(self._path)

    def _sweep(self) -> None:
        """Once: not while this very process may be writing."""
        if not self._swept:
            for folder in (self._run, self._path):
                for path in folder.glob(_TEMPORARIES):
                    path.unlink(missing_ok=True)
            self._swept = True

    def _by_step(self) -> dict[int, Path]:
        if not self._path.is_dir():
            return {}
        with _sentences_of(f"cannot read {self._path}"):
            matches = [_STEP_FILE.fullmatch(path.name) for path in self._path.iterdir()]
        return {int(match[1]): self._path / match[0] for match in matches if match}

    def _path_of(self, step: int) -> Path:
        return self._path / f"step-{step:08d}.safetensors"


@contextmanager
def _sentences_of(failure: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{failure}: {error.strerror or error}; mend that and try again") from error
