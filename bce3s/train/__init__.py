"""The training run: built from one config, saved as it goes, stopped and continued without a trace."""

from __future__ import annotations

from bce3s.train.build import (
    BEST_CHECKPOINT,
    average_applied,
    build_model,
    checkpoint_of_result,
    load_last,
    load_run,
    newest_checkpoint,
    saved_loader,
)
from bce3s.train.geometry import measure_with_geometry
from bce3s.train.result import RunResult, summary
from bce3s.train.state import Cursor, require_same_record
from bce3s.train.telling import SPOKEN, Telling
from bce3s.train.trained import TrainedNetwork, load_trained, moment_of, open_network, retrained_with, shards_of, with_loader_for
from bce3s.train.trainer import StoppedError, Trainer, TrainingError

__all__ = [
    "BEST_CHECKPOINT",
    "SPOKEN",
    "Cursor",
    "RunResult",
    "StoppedError",
    "Telling",
    "TrainedNetwork",
    "Trainer",
    "TrainingError",
    "average_applied",
    "build_model",
    "checkpoint_of_result",
    "load_last",
    "load_run",
    "load_trained",
    "measure_with_geometry",
    "moment_of",
    "newest_checkpoint",
    "open_network",
    "require_same_record",
    "retrained_with",
    "saved_loader",
    "shards_of",
    "summary",
    "with_loader_for",
]
