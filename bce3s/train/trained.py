"""What a command needs of a run that was trained before: its shards, one of its checkpoints, and a loader that can open the shards."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bce3s.checkpoint import Loaded, load_checkpoint
from bce3s.config import TrainConfig
from bce3s.device import Placement
from bce3s.models import Recogniser
from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, read_json
from bce3s.train.build import BEST_CHECKPOINT, checkpoint_of_result, load_last, load_run
from bce3s.train.state import Cursor
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import MADE_UP_PIXELS
from pipelines.store import is_remote
from pipelines.types import IntArray, ShardError


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


def retrained_with(state: dict[str, Any], run: Path | None) -> str:
    """The method of a stage two that trained this checkpoint's classifier anew; empty for a stage one.

    The run's folder says it; of a checkpoint that lies outside of one it is not known, and taken for a stage one's.
    """
    record = None if run is None else run / ENVIRONMENT_FILE
    if record is None or not record.is_file() or read_json(record).get("stage") != 2:
        return ""
    return str(json.loads(state["config"])["retrain"]["method"])


def moment_of(state: dict[str, Any], path: Path, shards: ShardSet | None) -> str:
    """'last epoch (3)', 'best epoch on val (2)', or of a run that is not at an epoch's end 'last checkpoint (step 12 of epoch 4)'.

    Args:
        state: of the checkpoint at `path`.
        path: of the checkpoint.
        shards: that it was trained on, which say what it was best on; None where they are gone.
    """
    cursor = Cursor(**state["cursor"])
    if path.name == BEST_CHECKPOINT:
        where = "" if shards is None else " on val" if shards.num_samples("val") else " on test"
        return f"best epoch{where} ({cursor.best_epoch + 1})"
    return f"last checkpoint ({cursor})" if cursor.step else f"last epoch ({cursor.epoch})"


def with_loader_for(config: TrainConfig, shards: ShardSet) -> TrainConfig:
    """`config` with a loader that serves the images of `shards`.

    What a run was trained from a folder with cannot stream, or has no pixels of the images; "auto" finds what does.
    """
    other = not isinstance(shards.root, Path) or config.data.loader in MADE_UP_PIXELS
    return replace(config, data=replace(config.data, loader="auto")) if other else config


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """A network that was trained, ready for use.

    Args:
        model: in evaluation mode, on its device.
        config: of the run; `config.data` says how its images are cropped and normalised.
        placement: device, precision and memory layout.
        class_names: K names.
        class_counts_K: int64 [K], training images.
        path: of the checkpoint.
        run: folder of the run; None for a checkpoint that lies outside of one.
        state: of the checkpoint, as it was saved.
        skipped: sentences on damaged checkpoints that were passed over.
    """

    model: Recogniser
    config: TrainConfig
    placement: Placement
    class_names: tuple[str, ...]
    class_counts_K: IntArray
    path: Path
    run: Path | None
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()


def open_network(place: Path, checkpoint: str | None = None, device: str = "auto") -> TrainedNetwork:
    """The trained network of a run folder, or of one checkpoint file.

    Args:
        place: run folder (of a stage two as well), or a file that ends in .safetensors.
        checkpoint: of a run folder, "last" or "best"; None is the one that is the run's result.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        CheckpointError: nothing there, or damaged.
        BackendError: the device cannot be used.
    """
    if place.suffix == ".safetensors":
        loaded = Loaded(load_checkpoint(place, torch.device("cpu")), place, ())
        run = next((folder for folder in (place.parent, place.parent.parent) if (folder / CONFIG_FILE).is_file()), None)
    else:
        loaded, run = load_trained(place, checkpoint or checkpoint_of_result(place)), place
    config, placement, model = load_run(loaded.state, device)
    return TrainedNetwork(
        model=model.eval(),
        config=config,
        placement=placement,
        class_names=tuple(loaded.state["class_names"]),
        class_counts_K=np.array(loaded.state["train_counts"], dtype=np.int64),
        path=loaded.path,
        run=run,
        state=loaded.state,
        skipped=tuple(loaded.skipped),
    )
