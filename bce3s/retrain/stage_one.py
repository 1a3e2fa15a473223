"""The run that stage two starts from, loaded."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bce3s.checkpoint import load_checkpoint, require_same_data
from bce3s.config import RetrainConfig, TrainConfig
from bce3s.device import Placement, apply_numerics, resolve_device
from bce3s.losses import resolve_method
from bce3s.models import Recogniser
from bce3s.runlog import ENVIRONMENT_FILE, read_json
from bce3s.seeds import is_finished
from bce3s.train import BEST_CHECKPOINT, checkpoint_of_result, load_last, load_run
from pipelines.config import require, require_choice
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import MADE_UP_PIXELS
from pipelines.store import is_remote
from pipelines.types import ShardError

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


def shards_of(run: Path, location: str | None) -> ShardSet:
    """The shards at `location`, or those that a run was trained on.

    Raises:
        ShardError: they are not there any more.
        UserError: `run` is no run folder.
    """
    recorded = read_json(run / ENVIRONMENT_FILE)
    found = location or str(recorded.get("shards", ""))
    if location is None and not is_remote(found) and not Path(found).is_dir():
        raise ShardError(f"the shards of {run} are not at {found} any more; name where they are with --shards")
    return open_shards(found)


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
    path, skipped = run / BEST_CHECKPOINT, tuple[str, ...]()
    if checkpoint == "last":
        loaded = load_last(run)
        path, state, skipped = loaded.path, loaded.state, loaded.skipped
    else:
        state = load_checkpoint(path, torch.device("cpu"))
    require_same_data(state, path, shards.dataset, shards.fingerprint, shards.root)
    config, placement, model = load_run(state, device)
    done, whole = state["cursor"]["epoch"], checkpoint == "best" or state["cursor"]["epoch"] >= config.epochs
    require(whole, f"{run} has done {done} of {config.epochs} epochs; finish stage one with 'bce3s fast-train … --resume' first")
    # The best epoch so far is no result either: a later one may be better.
    require(is_finished(run), f"{run} has not ended; finish stage one with 'bce3s fast-train … --resume' first")
    apply_numerics(config)
    # What a run was trained from a folder with cannot stream, or has no pixels of the images; "auto" finds what does.
    if not isinstance(shards.root, Path) or config.data.loader in MADE_UP_PIXELS:
        config = replace(config, data=replace(config.data, loader="auto"))
    return StageOne(
        path=path,
        state=state,
        skipped=skipped,
        config=resolve_method(config),
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
