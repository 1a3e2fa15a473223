"""The command that trains a run, for whoever wants to do it again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from bce3s.config import TrainConfig, by_path, from_dict, to_json
from pipelines.types import UserError

_FLAGS = {"loss.name": "--method", "model.arch": "--arch", "epochs": "--epochs", "seed": "--seed"}


def command_of(folder: Path, config: dict[str, Any], environment: dict[str, Any]) -> tuple[str, bool]:
    """The recorded command, or one with the same settings.

    Args:
        folder: of the run.
        config, environment: as it recorded them.

    Returns:
        The command, and whether it is the recorded one; empty where none can be given, for the settings are of another version.
    """
    recorded = environment.get("command")
    if isinstance(recorded, str) and recorded:
        return recorded, True
    try:
        if environment.get("stage") == 2:
            return _retraining(folder, config), False
        return _training(folder, config, environment), False
    except UserError:
        return "", False


def _retraining(folder: Path, config: dict[str, Any]) -> str:
    from bce3s.retrain.record import retraining_command

    return retraining_command(folder.parent, from_dict(TrainConfig, config).retrain)


def _training(folder: Path, config: dict[str, Any], environment: dict[str, Any]) -> str:
    """`fast-train` with every setting that the data set's recipe and the method do not bring by themselves."""
    from bce3s.losses import resolve_method
    from bce3s.throughput.command import resolve_config

    wanted = by_path(json.loads(to_json(resolve_method(from_dict(TrainConfig, config)))))
    dataset = str(wanted["dataset"])
    flags = {name: wanted[name] for name in _FLAGS}
    own = by_path(json.loads(to_json(resolve_config(dataset, None, flags, []))))
    options = [part for name, flag in _FLAGS.items() for part in (flag, str(wanted[name]))]
    settings = [f"{name}={_text(value)}" for name, value in wanted.items() if value != own[name]]
    set_to = [part for setting in settings for part in ("--set", setting)]
    shards = ["--shards", str(environment["shards"])] if environment.get("shards") else []
    return shlex.join(["bce3s", "fast-train", "--dataset", dataset, *shards, "--out", str(folder), *options, *set_to])


def _text(value: Any) -> str:
    """As `--set` reads it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)
