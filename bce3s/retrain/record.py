"""A stage two on disk: a run folder like that of stage one, which appears whole or not at all."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bce3s.checkpoint import CheckpointFolder
from bce3s.config import RetrainConfig, TrainConfig, by_path, from_dict, to_json
from bce3s.device import environment
from bce3s.losses import resolve_method
from bce3s.retrain.stage_one import FOLDER_PREFIX, STAGE, StageOne, file_checksum, stage_one_facts
from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, read_json
from bce3s.seeds import is_finished
from bce3s.train import BEST_CHECKPOINT, checkpoint_of_result, newest_checkpoint
from bce3s.train.state import is_free_on_resume
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
    if not path.is_file():
        return False
    stat = path.stat()
    return bool(read_json(folder / ENVIRONMENT_FILE)["stage_one"]["crc32"] == _checksum(path, stat.st_mtime_ns, stat.st_size))


@functools.cache
def _checksum(path: Path, modified_ns: int, num_bytes: int) -> str:
    """A table asks for the same large files after every run."""
    del modified_ns, num_bytes
    return file_checksum(path)


def require_same_retraining(folder: Path, config: TrainConfig) -> None:
    """The stage two in `folder`, in the folder of its stage one, is one that `fast-train --stages 2` makes of this config.

    Args:
        folder: of a finished stage two.
        config: of the command.

    Raises:
        ConfigError: it came of a checkpoint that is not the run's result, or of another retraining, seed or data setting; names the first
            that differs, and the command that makes it anew.
    """
    checkpoint = checkpoint_of_result(folder.parent)
    saved = read_json(folder / CONFIG_FILE)
    saved = by_path({**saved, "retrain": asdict(_retraining(saved).resolved())})
    asked = by_path(json.loads(to_json(replace(resolve_method(config), retrain=config.retrain.resolved()))))
    way_out = f"use the same, or make it anew with: {retraining_command(folder.parent, config.retrain)}"
    started = read_json(folder / ENVIRONMENT_FILE)["stage_one"]["checkpoint"]
    if (Path(started).name == BEST_CHECKPOINT) != (checkpoint == "best"):
        other = "last" if checkpoint == "best" else "best"
        raise ConfigError(f"{folder} was made from the {other} checkpoint, this command takes the {checkpoint} one; {way_out}")
    for name, value in asked.items():
        if _matters(name) and name in saved and saved[name] != value:
            raise ConfigError(f"{folder} was made with {name}={saved[name]!r}, this command says {value!r}; {way_out}")


def _matters(name: str) -> bool:
    """A loader serves the same order as any other, and what stands for "auto" may have changed."""
    of_stage_two = name.startswith("retrain.") or (name.startswith("data.") and not is_free_on_resume(name))
    return name == "seed" or (of_stage_two and name != "data.loader")


def _retraining(saved: dict[str, Any]) -> RetrainConfig:
    """Of a run's config; settings that were added to this code since have their defaults."""
    return from_dict(RetrainConfig, saved.get("retrain", {}))


def retraining_command(run: Path, asked: RetrainConfig) -> str:
    """`retrain-classifier` of the run in folder `run` to this effect: with the settings that it would not take from there by itself."""
    asked, own = asked.resolved(), _retraining(read_json(run / CONFIG_FILE))
    without = asdict(own.for_method(asked.method).resolved())
    method = [] if asked.method == own.method else ["--method", asked.method]
    settings = [f"retrain.{name}={value}" for name, value in asdict(asked).items() if value != without[name]]
    set_to = [part for setting in settings for part in ("--set", setting)]
    return shlex.join(["bce3s", "retrain-classifier", str(run), *method, *set_to, "--overwrite"])


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
    out: Path,
    stage_one: StageOne,
    config: TrainConfig,
    model_state: dict[str, Any],
    cursor: dict[str, Any],
    lines: list[dict[str, Any]],
    command: str = "",
) -> None:
    """Writes all files beside `out` and moves them there in one step; what a killed process left half written goes first.

    Args:
        out: the folder; replaced where it exists.
        stage_one: where it came from.
        config: of the result: stage one's with the retraining and the classifier's kind.
        model_state: of the whole network.
        cursor: epochs and steps of stage two.
        lines: of metrics.jsonl, the summary last.
        command: that it was started by.

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
        "command": command,
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
