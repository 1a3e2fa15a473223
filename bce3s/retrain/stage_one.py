"""The run that stage two starts from, loaded."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bce3s.checkpoint import require_same_data
from bce3s.config import RetrainConfig, TrainConfig
from bce3s.device import Placement, apply_numerics, resolve_device
from bce3s.losses import resolve_method
from bce3s.models import Recogniser
from bce3s.runlog import ENVIRONMENT_FILE, read_json
from bce3s.seeds import is_finished
from bce3s.train import checkpoint_of_result, load_run, load_trained, with_loader_for
from pipelines.config import require, require_choice
from pipelines.format import ShardSet

CHECKPOINTS = ("last", "best")
STAGE = 2  # what the record of a stage two says
FOLDER_PREFIX = "stage2-"


@dataclass(frozen=True, kw_only=True)
class StageOne:
    """A trained run.

    Args:
        path: the checkpoint.
        state: what it holds.
        skipped: sentences on damaged checkpoints that were passed over.
        config: of the run, with a loader that can open `shards`.
        placement: device and precision.
        model: its network, on the device.
        shards: what it was trained on.
    """

    path: Path
    state: dict[str, Any]
    skipped: tuple[str, ...]
    config: TrainConfig
    placement: Placement
    model: Recogniser
    shards: ShardSet


def load_stage_one(run: Path, checkpoint: str | None, shards: ShardSet, device: str) -> StageOne:
    """The network of a run and what belongs to it.

    Args:
        run: its folder.
        checkpoint: "last" is the newest that is whole, "best" that of the best epoch; None is whichever is the run's result.
        shards: what it was trained on.
        device: where to go on; "auto" chooses.

    Raises:
        CheckpointError: it has none, or all are damaged.
        ConfigError: the shards are others than the run's, or the run has not ended.
        BackendError: the device cannot be used.
    """
    require_choice("checkpoint", checkpoint or "last", CHECKPOINTS)
    resolve_device(device)  # before a large file is read
    is_second = read_json(run / ENVIRONMENT_FILE).get("stage") == STAGE
    require(not is_second, f"{run} is a stage two already; name the folder of its stage one")
    if checkpoint is None:
        checkpoint = checkpoint_of_result(run)
    loaded = load_trained(run, checkpoint)
    state, path = loaded.state, loaded.path
    require_same_data(state, path, shards.dataset, shards.fingerprint, shards.root)
    config, placement, model = load_run(state, device)
    done, whole = state["cursor"]["epoch"], checkpoint == "best" or state["cursor"]["epoch"] >= config.epochs
    require(whole, f"{run} has done {done} of {config.epochs} epochs; finish stage one with 'bce3s fast-train … --resume' first")
    # The best epoch so far is no result either: a later one may be better.
    require(is_finished(run), f"{run} has not ended; finish stage one with 'bce3s fast-train … --resume' first")
    apply_numerics(config)
    return StageOne(
        path=path,
        state=state,
        skipped=loaded.skipped,
        config=resolve_method(with_loader_for(config, shards)),
        placement=placement,
        model=model,
        shards=shards,
    )


def stage_one_facts(stage_one: StageOne) -> dict[str, Any]:
    """What a stage two says of where it came from, ready for JSON: the file, its checksum, and the epochs that it had."""
    cursor, path = stage_one.state["cursor"], stage_one.path
    return {"checkpoint": str(path), "crc32": file_checksum(path), "epoch": cursor["epoch"], "global_step": cursor["global_step"]}


def file_checksum(path: Path) -> str:
    """CRC-32 of a file, eight hex digits."""
    return f"{zlib.crc32(path.read_bytes()):08x}"


def stage_two_folder(run: Path, config: RetrainConfig) -> Path:
    """Where a stage two lies unless told otherwise."""
    return run / f"{FOLDER_PREFIX}{config.method}"
