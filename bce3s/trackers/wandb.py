"""Weights & Biases, by its own library and its own environment variables: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY and so on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bce3s.runlog import read_json
from pipelines.durable import write_atomically
from pipelines.types import BackendError

ID_FILE = "wandb-run.json"
_PROJECT = "bce3s"


class WandbTracker:
    """One run there for one run folder; its id lies in RUN/wandb-run.json, so that a continuation goes on in the same one."""

    def __init__(self, folder: Path, config: dict[str, Any], steps_done: int) -> None:
        """Begins a run, or goes on with the folder's.

        Raises:
            BackendError: wandb does not start: nobody is logged in, or it reaches no server.
        """
        import wandb

        path = folder / ID_FILE
        known = read_json(path) if steps_done and path.is_file() else {}
        try:
            self._run = wandb.init(
                id=known.get("id"),
                resume="allow",
                project=known.get("project") or os.environ.get("WANDB_PROJECT", _PROJECT),
                name=os.environ.get("WANDB_NAME") or folder.name,
                dir=str(folder),
                config=config,
                # Its own lines and its capture of ours would tear the dashboard.
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # UsageError, CommError and others of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BackendError(f"--log wandb does not start ({reason}): run 'wandb login', or set WANDB_MODE=offline") from error
        write_atomically(path, json.dumps({"id": self._run.id, "project": self._run.project}).encode())
        # By our own count of steps: wandb's must not go back, and a continuation does.
        self._run.define_metric("*", step_metric="step")

    def write(self, figures: dict[str, float], step: int) -> None:
        """One row of its history."""
        self._run.log({**figures, "step": step})

    def finish(self, figures: dict[str, float]) -> None:
        """Into its summary."""
        self._run.summary.update(figures)

    def close(self, *, well: bool) -> None:
        """Ends the run there; waits until what is left has been sent."""
        self._run.finish(exit_code=0 if well else 1)
