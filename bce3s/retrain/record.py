"""A stage two on disk: a run folder like that of stage one, which appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bce3s.checkpoint import CheckpointFolder
from bce3s.config import TrainConfig, to_json
from bce3s.device import environment
from bce3s.retrain.stage_one import FOLDER_PREFIX, STAGE, StageOne, file_checksum, stage_one_facts
from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, read_json
from bce3s.seeds import is_finished
from bce3s.train import BEST_CHECKPOINT, newest_checkpoint
from pipelines.durable import publish_folder, write_atomically
from pipelines.types import ConfigError, UserError


def is_stage_two(folder: Path) -> bool:
    """Whether `folder` holds a finished stage two."""
    return (folder / ENVIRONMENT_FILE).is_file() and read_json(folder / ENVIRONMENT_FILE).get("stage") == STAGE and is_finished(folder)


def discard_stage_twos(run: Path) -> None:
    """Deletes every stage two in the folder of a run that is being trained anew."""
    for folder in run.glob(f"{FOLDER_PREFIX}*"):
        if is_stage_two(folder):
            shutil.rmtree(folder, ignore_errors=True)


def started_from(folder: Path, run: Path, checkpoint: str) -> bool:
    """Whether the stage two in `folder` says that it came of the very bytes that are the last or best checkpoint of `run` now."""
    path = newest_checkpoint(run) if checkpoint == "last" else run / BEST_CHECKPOINT
    facts = read_json(folder / ENVIRONMENT_FILE)["stage_one"]
    return path.is_file() and facts["crc32"] == file_checksum(path)


def require_same_retraining(folder: Path, config: TrainConfig) -> None:
    """Raises `ConfigError` naming the first setting in which the stage two in `folder` differs from `config.retrain`."""
    saved = read_json(folder / CONFIG_FILE)["retrain"]
    asked = asdict(replace(config.retrain, learning_rate=config.retrain.peak_learning_rate()))
    for name, value in asked.items():
        if saved.get(name) != value:
            raise ConfigError(
                f"{folder} was made with retrain.{name}={saved.get(name)!r}, this command says {value!r}; use the same, "
                f"or make it anew with 'bce3s retrain-classifier {folder.parent} --overwrite'"
            )


def require_room(out: Path, *, overwrite: bool) -> None:
    """Raises `ConfigError` unless `out` can be made, or holds a stage two that may go: nothing else is ever deleted."""
    anchor = next(parent for parent in out.absolute().parents if parent.exists())
    if not (anchor.is_dir() and os.access(anchor, os.W_OK)):
        raise ConfigError(f"{out} cannot be made, for {anchor} is no folder that can be written to; choose another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_stage_two(out):
        raise ConfigError(f"{out} is there already and holds no stage two; choose another --out")
    if not overwrite:
        raise ConfigError(f"{out} holds a finished stage two; add --overwrite to do it again, or choose another --out")


def write_stage_two(
    out: Path, stage_one: StageOne, config: TrainConfig, model_state: dict[str, Any], cursor: dict[str, Any], lines: list[dict[str, Any]]
) -> None:
    """Writes all files beside `out` and moves them there in one step; what a killed process left half written goes first.

    Args:
        out: the folder; replaced where it exists.
        stage_one: where it came from.
        config: of the result: stage one's with the retraining and the classifier's kind.
        model_state: of the whole network.
        cursor: epochs and steps of stage two.
        lines: of metrics.jsonl, the summary last.

    Raises:
        UserError: the disk is full or read-only; what was there before still stands.
    """
    unfinished = out.with_name(f".{out.name}.bce3s-unfinished")
    kept = ("precision", "world_size", "versions", "dataset", "fingerprint", "class_names", "train_counts")
    state = {
        **{name: stage_one.state[name] for name in kept},
        "model": model_state,
        "cursor": cursor,
        "config": to_json(config),
        "precision": stage_one.placement.precision,
        "world_size": 1,
        "average": None,
    }
    record = {
        **environment(stage_one.placement.device),
        "precision": stage_one.placement.precision,
        "world_size": 1,
        "job": "",
        "shards": stage_one.shards.address,
        "fingerprint": stage_one.shards.fingerprint,
        "loss_floors": {},
        "stage": STAGE,
        "stage_one": stage_one_facts(stage_one),
    }
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        CheckpointFolder(unfinished, keep=1).save(cursor["global_step"], state)
        write_atomically(unfinished / CONFIG_FILE, to_json(config).encode())
        write_atomically(unfinished / ENVIRONMENT_FILE, json.dumps(record, indent=1).encode())
        write_atomically(unfinished / METRICS_FILE, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
        publish_folder(unfinished, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; mend that and try again") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
