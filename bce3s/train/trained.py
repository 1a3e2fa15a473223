"""What a command needs of a run that was trained before: its shards, one of its checkpoints, and a loader that can open the shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from bce3s.checkpoint import Loaded, load_checkpoint
from bce3s.config import TrainConfig
from bce3s.runlog import ENVIRONMENT_FILE, read_json
from bce3s.train.build import BEST_CHECKPOINT, load_last
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import MADE_UP_PIXELS
from pipelines.store import is_remote
from pipelines.types import ShardError


def shards_of(run: Path, location: str | None) -> ShardSet:
    """The shards at `location`, or those that a run was trained on.

    Raises:
        ShardError: they are not there any more.
        UserError: `run` is no run folder.
    """
    found = location or str(read_json(run / ENVIRONMENT_FILE).get("shards", ""))
    if location is None and not is_remote(found) and not Path(found).is_dir():
        raise ShardError(f"the shards of {run} are not at {found} any more; name where they are with --shards")
    return open_shards(found)


def load_trained(run: Path, checkpoint: str) -> Loaded:
    """A run's "last" checkpoint, the newest that is whole, or its "best"; tensors on the CPU.

    Raises:
        CheckpointError: it has none, or all are damaged.
    """
    if checkpoint == "last":
        return load_last(run)
    return Loaded(load_checkpoint(run / BEST_CHECKPOINT, torch.device("cpu")), run / BEST_CHECKPOINT, ())


def with_loader_for(config: TrainConfig, shards: ShardSet) -> TrainConfig:
    """`config` with a loader that serves the images of `shards`.

    What a run was trained from a folder with cannot stream, or has no pixels of the images; "auto" finds what does.
    """
    other = not isinstance(shards.root, Path) or config.data.loader in MADE_UP_PIXELS
    return replace(config, data=replace(config.data, loader="auto")) if other else config
