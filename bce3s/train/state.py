"""Everything a continuation needs: collected for a checkpoint, and put back from one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bce3s.checkpoint import require_same_data
from bce3s.config import TrainConfig, by_path, from_dict, to_json
from bce3s.device import package_versions
from bce3s.distributed import World, load_running_statistics, running_statistics
from bce3s.losses import resolve_method
from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, read_json
from bce3s.step import TrainStep
from bce3s.train.build import saved_loader
from bce3s.train.means import TermMeans
from pipelines.format import ShardSet
from pipelines.types import ConfigError

# Settings that may differ between a run and its continuation: they change where or how it runs, not what it computes.
_FREE_ON_RESUME = {
    *("device", "log_every", "data.num_threads", "data.prefetch_batches", "data.on_error", "data.stream.patience_s"),
    *("data.dali.feed", "data.dali.hw_decoder_load", "data.resident.cache", "cuda_graphs", "checkpoint.every", "checkpoint.keep"),
    "precision",  # what it resolves to is compared
    "select",
}


@dataclass
class Cursor:
    """How far a run is.

    Attributes:
        epoch: in progress, from 0; the number of epochs that are done.
        step: steps of that epoch that are done; all of them while its evaluation is still to come.
        global_step: steps of the run that are done.
        epoch_s, epoch_images: seconds and source images that the epoch in progress has taken so far.
        best_accuracy, best_epoch: on the selection split, so far; −1 before the first evaluation.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    epoch_s: float = 0.0
    epoch_images: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = -1

    def next_epoch(self) -> None:
        """The epoch in progress is done."""
        self.epoch, self.step, self.epoch_s, self.epoch_images = self.epoch + 1, 0, 0.0, 0

    def __str__(self) -> str:
        """'epoch 3' or 'step 12 of epoch 4', as people count."""
        return f"step {self.step} of epoch {self.epoch + 1}" if self.step else f"epoch {self.epoch}"


class RunState:
    """The parts of one run that change while it trains.

    Attributes:
        cursor: how far it is.
        means: of the epoch in progress.
    """

    def __init__(self, config: TrainConfig, shards: ShardSet, step: TrainStep, world: World) -> None:
        """At the beginning."""
        self._config, self._shards, self._step, self._world = config, shards, step, world
        self.cursor = Cursor()
        self.means = TermMeans(world)

    def state_dict(self) -> dict[str, Any]:
        """Everything; the tensors are the live ones, to be copied before the next step, inside `rank_average`."""
        step = self._step
        return {
            **self.weights_dict(),
            "optimizer": step.optimizer.state_dict(),
            "scaler": _scale(step.scaler),
            "average": None if step.average is None else step.average.state_dict(),
            "means": self.means.state(),
            "generators": _generators(step.placement.device),
        }

    def weights_dict(self) -> dict[str, Any]:
        """What it takes to evaluate: the network, and what identifies the run; live tensors."""
        step, config, shards = self._step, self._config, self._shards
        return {
            "model": step.model.state_dict(),
            "cursor": asdict(self.cursor),
            "config": to_json(config),
            "precision": step.placement.precision,
            "world_size": self._world.size,
            "versions": package_versions(),
            "dataset": shards.dataset,
            "fingerprint": shards.fingerprint,
            "class_names": list(shards.class_names),
            "train_counts": shards.class_counts("train").tolist(),
        }

    @contextmanager
    def rank_average(self) -> Iterator[Tensor | None]:
        """Inside, batch-norm's statistics are the mean of all ranks', for evaluating and saving; all ranks enter it together.

        Training continues with each rank's own afterwards, so when somebody evaluates or saves leaves no trace. Yields all ranks' own,
        float32 [W, R], for an exact continuation; None where they are equal anyway.
        """
        if self._world.size == 1 or self._config.sync_batch_norm:
            yield None
            return
        own_R = self._statistics()
        all_WR = self._world.gather_rows(own_R[None])
        self._load_statistics(all_WR.mean(0))
        try:
            yield all_WR
        finally:
            self._load_statistics(own_R)

    def _statistics(self) -> Tensor:
        """Batch-norm's of the model, and then those of the moving average of the weights where there is one; float32 [R]."""
        model, average = self._step.model, self._step.average
        if average is None:
            return running_statistics(model)
        with average.applied():
            averaged = running_statistics(model)
        return torch.cat([running_statistics(model), averaged])

    def _load_statistics(self, flat_R: Tensor) -> None:
        model, average = self._step.model, self._step.average
        if average is None:
            load_running_statistics(model, flat_R)
            return
        own, averaged = flat_R.chunk(2)
        load_running_statistics(model, own)
        with average.applied():
            load_running_statistics(model, averaged)

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Continues from a checkpoint.

        Raises:
            ConfigError: the checkpoint is of other data, another config or precision; names the first setting that differs.
        """
        step, shards = self._step, self._shards
        require_same_data(state, path, shards.dataset, shards.fingerprint, shards.root)
        require_same_config(json.loads(state["config"]), json.loads(to_json(self._config)), path)
        if state["precision"] != step.placement.precision:
            raise ConfigError(
                f"{path} was trained in {state['precision']}, and this device would continue in {step.placement.precision}; "
                f"add --precision {state['precision']} where it is supported, or choose another --out"
            )
        step.model.load_state_dict(state["model"])
        step.optimizer.load_state_dict(state["optimizer"])
        _restore_scale(step.scaler, state["scaler"])
        if step.average is not None:
            step.average.load_state_dict(state["average"])
        self.means.load_state(state["means"], step.placement.device)
        _restore_generators(state["generators"], step.placement.device)
        self.cursor = Cursor(**state["cursor"])
        statistics_WR = state.get("rank_statistics")
        if statistics_WR is not None and len(statistics_WR) == self._world.size and not self._config.sync_batch_norm:
            self._load_statistics(statistics_WR[self._world.rank])


def _scale(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """fp16's loss scale as it lies on the device: the scaler's own state dict waits for it. Empty in other precisions."""
    # A scaler that is off, or has not scaled yet, has no such tensors.
    if not scaler.is_enabled() or scaler._scale is None or scaler._growth_tracker is None:
        return {}
    return {"scale": scaler._scale, "growth_tracker": scaler._growth_tracker}


def _restore_scale(scaler: torch.amp.GradScaler, saved: dict[str, Tensor]) -> None:
    if saved:
        values = {"scale": saved["scale"].item(), "_growth_tracker": int(saved["growth_tracker"].item())}
        scaler.load_state_dict({**scaler.state_dict(), **values})


def _generators(device: torch.device) -> dict[str, Tensor]:
    """States of torch's own generators: nothing of ours draws from them, but a network with dropout would."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def require_same_start(model: nn.Module, world: World, config: TrainConfig, shards: ShardSet) -> None:
    """Raises `ConfigError` unless all ranks hold the same data, settings and weights: one that does not would quietly spoil the others'."""
    if world.size == 1:
        return
    settings = json.dumps(_settings(config), sort_keys=True)
    if not _agree(world, model, _number_of(shards.fingerprint)):
        raise ConfigError("the ranks read different shards (their manifests differ); give every node the same ones")
    if not _agree(world, model, _number_of(settings)):
        raise ConfigError("the ranks were started with different settings; give every node the same command")
    if not _agree(world, model, torch.stack([parameter.detach().double().sum() for parameter in model.parameters()]).sum()):
        raise ConfigError("the ranks start from different weights; give every node the same torch version, run folder and checkpoint")


def _agree(world: World, model: nn.Module, value: Tensor) -> bool:
    """Whether `value` [] is the same on all ranks."""
    values_W = world.gather_rows(value.to(next(model.parameters()).device)[None])
    return bool((values_W == values_W[0]).all())


def _number_of(text: str) -> Tensor:
    """int64 []: a fingerprint."""
    return torch.tensor(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What changes results, by full name. "auto" may choose a loader by a rank's free memory; all but one of them serve the same order."""
    settings = by_path(json.loads(to_json(config)))
    settings["data.loader"] = settings["data.loader"] == "webdataset"
    return {name: value for name, value in settings.items() if not is_free_on_resume(name)}


def is_free_on_resume(name: str) -> bool:
    """Whether the setting `name`, such as "data.num_threads", may differ between a run and its continuation."""
    return name in _FREE_ON_RESUME or name.startswith("retrain.")


def require_same_record(run: Path, config: TrainConfig, shards: ShardSet) -> None:
    """Raises `ConfigError` unless the run in folder `run` was trained with this config on these shards, by its record."""
    saved, recorded = read_json(run / CONFIG_FILE), read_json(run / ENVIRONMENT_FILE)
    asked = json.loads(to_json(config))
    if config.data.loader == "auto":
        asked["data"]["loader"] = saved_loader(run)
    require_same_config(saved, asked, run)
    said = {"dataset": saved["dataset"], "fingerprint": recorded.get("fingerprint")}
    require_same_data(said, run, shards.dataset, shards.fingerprint, shards.root)


def require_same_config(saved: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    """Raises `ConfigError` naming the first setting that differs, unless it is free to.

    Args:
        saved: config of a run; settings that were added to this code since have their defaults, as `load_run` reads it.
        asked: config of the command.
        path: of `saved`.

    Raises:
        ConfigError: also where `saved` has a setting or value that this code does not know any more.
    """
    try:
        before = _completed(saved)
    except ConfigError as error:
        reason = str(error).partition("; known")[0]
        raise ConfigError(
            f"{path} was trained by another version of bce3s, which this one cannot continue ({reason}): take that one, or another --out"
        ) from None
    # The method first: other settings follow from it.
    for name, value in sorted(_completed(asked).items(), key=lambda setting: setting[0] != "loss.name"):
        if before[name] != value and not is_free_on_resume(name):
            raise ConfigError(
                f"{path} was trained with {name}={before[name]!r}, this command says {value!r}; use the same, or another --out"
            )


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a config by its full name, also those that `values` lacks, and with what its method decides filled in."""
    return by_path(json.loads(to_json(resolve_method(from_dict(TrainConfig, values)))))
