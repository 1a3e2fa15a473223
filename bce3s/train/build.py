"""A run's network, fresh from its config or from one of its checkpoints."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bce3s.checkpoint import CheckpointError, CheckpointFolder, Loaded
from bce3s.config import TrainConfig, from_dict, parse_image_sizes
from bce3s.device import Placement, resolve_device, resolve_placement
from bce3s.losses import loss_class, resolve_method
from bce3s.models import Recogniser, build_recogniser
from bce3s.runlog import CONFIG_FILE, read_json
from bce3s.weight_average import WeightAverage
from pipelines.types import ConfigError

BEST_CHECKPOINT = "best.safetensors"


def build_model(config: TrainConfig, num_classes: int, placement: Placement) -> Recogniser:
    """The network with weights drawn from the config's seed, on its device and in its memory layout."""
    torch.manual_seed(config.seed)
    config, method = resolve_method(config), loss_class(config.loss.name)
    sides = (config.data.image_size, *parse_image_sizes(config.image_sizes).values())
    model = build_recogniser(config.model, num_classes, partial(method.build_head, config.loss), sides)
    memory_format = torch.channels_last if placement.channels_last else torch.contiguous_format
    return model.to(device=placement.device, memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def saved_loader(run: Path) -> str:
    """The loader that the run in folder `run` was trained with, by its name.

    Raises:
        UserError: its config is missing or damaged; names the path.
    """
    data = read_json(run / CONFIG_FILE).get("data")
    return str(data.get("loader", "auto")) if isinstance(data, dict) else "auto"


def load_last(run: Path) -> Loaded:
    """The newest checkpoint of a run that is whole, its tensors on the CPU, and sentences on the damaged ones that were passed over.

    Raises:
        CheckpointError: it has none, or all are damaged.
    """
    loaded = CheckpointFolder(run, keep=1).load_newest(torch.device("cpu"))
    if loaded is None:
        raise _has_none(run)
    return loaded


def newest_checkpoint(run: Path) -> Path:
    """Where the newest checkpoint of a run lies.

    Raises:
        CheckpointError: it has none.
    """
    newest = CheckpointFolder(run, keep=1).newest()
    if newest is None:
        raise _has_none(run)
    return newest


def checkpoint_of_result(run: Path) -> str:
    """Whose weights are the result of the run in folder `run`: "best" where it selects on val and has them, else "last".

    Raises:
        UserError: its config is missing or damaged; names the path.
    """
    selects = read_json(run / CONFIG_FILE).get("select") == "val"
    return "best" if selects and (run / BEST_CHECKPOINT).is_file() else "last"


def _has_none(run: Path) -> CheckpointError:
    return CheckpointError(f"no checkpoint in {run}; train first with 'bce3s fast-train --dataset NAME --out {run}'")


def average_applied(state: dict[str, Any], model: Recogniser, config: TrainConfig, path: Path) -> AbstractContextManager[None]:
    """Within, the network of `load_run` has the moving average of its weights.

    Raises:
        ConfigError: the run, or this checkpoint of it, keeps none.
    """
    if state.get("average") is None:
        raise ConfigError(f"{path} holds no moving average; train with --set ema_decay=0.999, and take --checkpoint last")
    average = WeightAverage(model, config.ema_decay)
    average.load_state_dict(state["average"])
    return average.applied()


def without_pretrained(config: TrainConfig) -> TrainConfig:
    """For a network whose checkpoint holds every weight: the file it started from may be gone."""
    return replace(config, model=replace(config.model, pretrained=""))


def load_run(state: dict[str, Any], device: str) -> tuple[TrainConfig, Placement, Recogniser]:
    """The config, placement and trained network of a checkpoint, on `device` ("auto" chooses); an fp16 run is read as fp32 on a CPU."""
    config = from_dict(TrainConfig, {**json.loads(state["config"]), "device": device})
    config = without_pretrained(config)
    if config.precision == "fp16" and resolve_device(device).type == "cpu":
        config = replace(config, precision="fp32")
    placement = resolve_placement(config)
    model = build_model(config, len(state["class_names"]), placement)
    model.load_state_dict(state["model"])
    return config, placement, model
