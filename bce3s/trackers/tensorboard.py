"""TensorBoard: event files under RUN/tensorboard, written by torch's own writer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bce3s.config import by_path

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Scalars by step of the run, the config as text, and at the end the config beside the result as hyperparameters."""

    def __init__(self, folder: Path, config: dict[str, Any], steps_done: int) -> None:
        """Begins in `folder`/tensorboard; a run that starts anew forgets what was there, one that goes on what it does again."""
        from torch.utils.tensorboard import SummaryWriter

        self._config, place = config, folder / FOLDER
        if not steps_done:
            shutil.rmtree(place, ignore_errors=True)
        # TensorBoard drops what a run that died had written of the steps from `purge_step` on.
        self._writer = SummaryWriter(str(place), purge_step=steps_done + 1 if steps_done else None, flush_secs=10)
        if not steps_done:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", 0)

    def write(self, figures: dict[str, float], step: int) -> None:
        """Scalars."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, figures: dict[str, float]) -> None:
        """Hyperparameters and result."""
        settings = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in by_path(self._config).items()
        }
        self._writer.add_hparams(settings, figures, run_name=".")

    def close(self, *, well: bool) -> None:
        """Writes what waits."""
        del well
        self._writer.close()
