"""Checkpoints that are whole or absent: written under a temporary name, fsynced, renamed; loaded without executing pickled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipelines.durable import replacing
from pipelines.types import ConfigError, UserError

CHECKPOINT_FORMAT = "bce3s-checkpoint"
CHECKPOINT_VERSION = 1


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to something else."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors and plain Python values.

    Raises:
        CheckpointError: the disk is full or read-only; an earlier checkpoint of that name still stands.
    """
    try:
        with replacing(path) as file:
            torch.save({"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, **state}, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot save {path}: {error}; what was there before still stands") from error


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Loads what `save_checkpoint` wrote.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this program.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; train first with 'bce3s fast-train --out {path.parent}'")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises EOFError, RuntimeError, UnpicklingError and more for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is not a bce3s checkpoint")
    if state["version"] != CHECKPOINT_VERSION:
        raise CheckpointError(f"{path} has checkpoint version {state['version']}, this program reads version {CHECKPOINT_VERSION}")
    return state


def require_same_data(state: dict[str, Any], path: Path, dataset: str, fingerprint: str, shards: Path | str) -> None:
    """Raises `ConfigError` unless the checkpoint was trained on these very shards."""
    if state["dataset"] != dataset:
        raise ConfigError(
            f"{path} was trained on '{state['dataset']}', but {shards} holds '{dataset}'; name the right --shards or another --out"
        )
    if state["fingerprint"] != fingerprint:
        raise ConfigError(
            f"{path} was trained on other '{dataset}' shards than {shards} (manifests differ); name the right --shards or another --out"
        )
