"""The training run: builds everything from one config, loops over epochs, evaluates, saves, and continues after a kill."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from bce3s.checkpoint import load_checkpoint, require_same_data, save_checkpoint
from bce3s.config import TrainConfig, from_dict, to_json
from bce3s.device import Placement, environment, resolve_device, resolve_placement
from bce3s.evaluate import evaluate
from bce3s.losses import build_loss
from bce3s.metrics import Accuracy
from bce3s.models import Recogniser, build_recogniser
from bce3s.progress import TrainingProgress
from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, RunLog, read_json, read_metrics
from bce3s.step import TrainStep
from bce3s.throughput.waits import DataWaits, Occupancy, binding_sentence
from pipelines.durable import write_atomically
from pipelines.format import ShardSet
from pipelines.loaders import PlannedLoader, build_loader, choose_loader
from pipelines.types import BackendError, Batch, ConfigError, UserError

LAST_CHECKPOINT, BEST_CHECKPOINT = "last.pt", "best.pt"
# Settings that may differ between a run and its continuation: they change where or how it runs, not what it computes.
_FREE_ON_RESUME = {
    *("device", "log_every", "data.num_threads", "data.prefetch_batches", "data.on_error", "data.stream.patience_s"),
    *("data.dali.feed", "data.dali.hw_decoder_load", "data.resident.cache"),
}


@dataclass
class RunState:
    """What a run has reached: epochs done and the best accuracy so far (on "val", or on "test" where there is no val split)."""

    epochs_done: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = -1


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The end of a run.

    Args:
        last: after the last epoch, without test-time augmentation: the headline.
        last_flip_tta: the same weights with flip test-time augmentation.
        best: of the checkpoint that was best on `selection_split`, after epoch `best_epoch` (from 0).
        report_split: where the three were measured: "test", or "val" where there is no test split.
        images_per_s: source images in training, median over the run's epochs.
        data_wait_share: of training time, median over the run's epochs.
    """

    last: Accuracy
    last_flip_tta: Accuracy
    best: Accuracy
    best_epoch: int
    selection_split: str
    report_split: str
    images_per_s: float
    data_wait_share: float


class TrainingError(UserError):
    """Training cannot go on; the checkpoint before still stands."""


class TermMeans:
    """Sums the loss terms of one epoch on the device; the host reads them once per log line, never per step."""

    def __init__(self) -> None:
        """Empty."""
        self._names: list[str] = []
        self._sums_2T = torch.zeros(0)  # since the last read, and over the epoch
        self._num_recent = self._num_all = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Adds one step's terms, float32 [] each, under the same names all epoch."""
        stacked_T = torch.stack(list(terms.values()))
        if not self._num_all:
            self._names, self._sums_2T = list(terms), torch.zeros_like(stacked_T).repeat(2, 1)
        self._sums_2T += stacked_T
        self._num_recent += 1
        self._num_all += 1

    def recent(self) -> dict[str, float]:
        """The means since the last call; waits for the device once."""
        values = (self._sums_2T[0] / self._num_recent).tolist()
        self._sums_2T[0] = 0
        self._num_recent = 0
        return dict(zip(self._names, values, strict=True))

    def epoch(self) -> dict[str, float]:
        """The means of all steps; waits for the device once."""
        return dict(zip(self._names, (self._sums_2T[1] / self._num_all).tolist(), strict=True))


class Trainer:
    """One run in one process. `fit` trains to the end; everything that must survive a kill goes through `state_dict`."""

    def __init__(self, config: TrainConfig, shards: ShardSet, out: Path, console: Console) -> None:
        """Builds model, step and loaders.

        Raises:
            UserError: shards of another data set, unknown names, a device or package that is missing.
        """
        if shards.dataset != config.dataset:
            raise ConfigError(
                f"{shards.root} holds data set '{shards.dataset}', not '{config.dataset}'; name the right --shards or --dataset"
            )
        self.config, self.shards, self.out, self.console = config, shards, out, console
        self.placement: Placement = resolve_placement(config)
        self.loader_choice = choose_loader(config.data, shards, self.placement.device)
        # From here on by its name: a continuation must not choose anew.
        self.config = config = replace(config, data=replace(config.data, loader=self.loader_choice.name))
        self.train_counts_K = shards.class_counts("train")
        self.report_split = next((split for split in ("test", "val") if shards.num_samples(split)), "")
        if not self.report_split:
            raise ConfigError(f"{shards.root} has neither test nor val images to evaluate on; make shards that have")
        self.selection_split = "val" if shards.num_samples("val") else self.report_split
        try:
            self.model = build_model(config, len(shards.class_names), self.placement)
            self.loss = build_loss(config.loss, torch.from_numpy(self.train_counts_K).to(self.placement.device))
            self.step = TrainStep(self.model, self.loss, config, self.placement)
            with console.status("opening shards"):
                self.loaders = {split: self._loader(split) for split in dict.fromkeys(("train", self.selection_split, self.report_split))}
        except torch.OutOfMemoryError:
            raise self._too_large() from None
        self.state = RunState()
        self._said_data_binds = False

    def _loader(self, split: str) -> PlannedLoader:
        return build_loader(self.shards, split, self.config.data, seed=self.config.seed, device=self.placement.device)

    def fit(self) -> RunResult:
        """Trains from the reached epoch to the last, then evaluates with and without flip TTA.

        Raises:
            TrainingError: a loss that is not finite, no device memory, or a disk that cannot be written.
        """
        try:
            return self._fit()
        except OSError as error:
            raise TrainingError(
                f"cannot write to {self.out}: {error.strerror or error}; mend that, then add --resume to continue"
            ) from error
        except torch.OutOfMemoryError:
            raise self._too_large() from None

    def _too_large(self) -> TrainingError:
        config = self.config.data
        other = ", or --loader dali, which keeps no images there" if config.loader == "resident" else ""
        return TrainingError(
            f"{self.placement.device} ran out of memory at batch size {config.batch_size}; take a smaller --batch-size{other}"
        )

    def _fit(self) -> RunResult:
        first_epoch = self.state.epochs_done
        self._write_record()
        if not first_epoch:
            for name in (LAST_CHECKPOINT, BEST_CHECKPOINT):
                (self.out / name).unlink(missing_ok=True)  # of a run that is being overwritten
        num_steps = self.loaders["train"].num_steps
        with RunLog(self.out, first_epoch) as log, TrainingProgress(self.console, self.config.epochs, num_steps, first_epoch) as progress:
            for epoch in range(first_epoch, self.config.epochs):
                line = self._train_epoch(epoch, log, progress)
                accuracy = None
                if (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs:
                    accuracy = self._evaluate(self.selection_split, progress)["plain"]
                log.write({"kind": "epoch", **line, "split": self.selection_split, **(accuracy.headline() if accuracy else {})})
                progress.show_epoch(epoch, line, accuracy)
                self._save(epoch, accuracy)
            result = self._final_result(progress)
            log.write({"kind": "summary", **summary(result)})
        return result

    def _write_record(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / CONFIG_FILE, to_json(self.config).encode())
        record = {
            **environment(self.placement.device),
            "precision": self.placement.precision,
            "shards": self.shards.address,
            "fingerprint": self.shards.fingerprint,
            "loss_floors": self.loss.floors(len(self.train_counts_K)),
        }
        write_atomically(self.out / ENVIRONMENT_FILE, json.dumps(record, indent=1).encode())

    def _train_epoch(self, epoch: int, log: RunLog, progress: TrainingProgress) -> dict[str, Any]:
        """One pass over the instance stream; returns the epoch's log line."""
        self.model.train()
        means = TermMeans()
        started_s = logged_s = time.perf_counter()
        num_images = logged_images = 0
        num_steps = self.loaders["train"].num_steps
        waits = DataWaits(self._batches(epoch), self.placement.device)
        for batch in waits:
            means.add(self.step(batch, num_steps))
            num_images += batch.num_sources
            progress.advance(epoch)
            if (batch.step + 1) % self.config.log_every == 0:
                values = self._finite(means.recent(), epoch)
                now_s = time.perf_counter()
                rates = {"images_per_s": (num_images - logged_images) / (now_s - logged_s), **asdict(waits.recent())}
                log.write({"kind": "step", "epoch": epoch, "step": batch.step, **rates, **values})
                progress.show_rates(rates["images_per_s"], rates["data_wait_share"], values)
                logged_s, logged_images = now_s, num_images
        values = self._finite(means.epoch(), epoch)
        elapsed_s, occupancy = time.perf_counter() - started_s, waits.total()
        self._say_if_data_binds(occupancy)
        return {"epoch": epoch, "images_per_s": num_images / elapsed_s, "train_s": elapsed_s, **asdict(occupancy), **values}

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """The loader's; what it cannot read or write is not the run folder's fault."""
        try:
            yield from self.loaders["train"].epoch(epoch)
        except OSError as error:
            raise BackendError(f"loader '{self.loader_choice.name}' failed: {error}; mend that, then add --resume to continue") from error

    def _say_if_data_binds(self, occupancy: Occupancy) -> None:
        """Once a run: an epoch that waited for data is explained; later ones would only repeat it."""
        if self._said_data_binds:
            return
        split = self.shards.split("train")
        stored_side = float(np.median(np.minimum(split.heights_N, split.widths_N)))
        sentence = binding_sentence(occupancy, self.loader_choice, self.config.data, stored_side)
        if sentence:
            self._said_data_binds = True
            self.console.print(sentence, highlight=False, soft_wrap=True)

    def _finite(self, values: dict[str, float], epoch: int) -> dict[str, float]:
        """`values`, or an error before anything of a broken model is saved."""
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            saved = (
                f"{self.out / LAST_CHECKPOINT} holds epoch {self.state.epochs_done}" if self.state.epochs_done else "nothing was saved yet"
            )
            raise TrainingError(
                f"the loss ({', '.join(broken)}) is not finite in epoch {epoch + 1}; {saved}; lower --lr or raise the warm-up"
            )
        return values

    def _evaluate(self, split: str, progress: TrainingProgress, *, flip_tta: bool = False) -> dict[str, Accuracy]:
        loader = self.loaders[split]
        with progress.activity(f"evaluating {split}", loader.num_steps) as advance:
            return evaluate(
                self.model, loader, self.train_counts_K, self.config.data.augment, self.placement, flip_tta=flip_tta, on_step=advance
            )

    def _save(self, epoch: int, accuracy: Accuracy | None) -> None:
        self.state.epochs_done = epoch + 1
        improved = accuracy is not None and (accuracy.all or 0.0) > self.state.best_accuracy
        if improved and accuracy is not None:
            self.state.best_accuracy, self.state.best_epoch = accuracy.all or 0.0, epoch
            save_checkpoint(self.out / BEST_CHECKPOINT, self.state_dict())
        save_checkpoint(self.out / LAST_CHECKPOINT, self.state_dict())

    def _final_result(self, progress: TrainingProgress) -> RunResult:
        last = self._evaluate(self.report_split, progress, flip_tta=True)
        best = last["plain"]
        if self.state.best_epoch + 1 != self.config.epochs:
            last_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(load_checkpoint(self.out / BEST_CHECKPOINT, self.placement.device)["model"])
            best = self._evaluate(self.report_split, progress)["plain"]
            self.model.load_state_dict(last_weights)
        epochs = [line for line in read_metrics(self.out) if line["kind"] == "epoch"]
        return RunResult(
            last=last["plain"],
            last_flip_tta=last["flip_tta"],
            best=best,
            best_epoch=self.state.best_epoch,
            selection_split=self.selection_split,
            report_split=self.report_split,
            images_per_s=statistics.median(line["images_per_s"] for line in epochs),
            data_wait_share=statistics.median(line["data_wait_share"] for line in epochs),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a continuation needs, and what identifies the run."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "epochs_done": self.state.epochs_done,
            "best_accuracy": self.state.best_accuracy,
            "best_epoch": self.state.best_epoch,
            "config": to_json(self.config),
            "precision": self.placement.precision,
            "dataset": self.shards.dataset,
            "fingerprint": self.shards.fingerprint,
            "class_names": list(self.shards.class_names),
            "train_counts": self.train_counts_K.tolist(),
        }

    def resume(self) -> int:
        """Continues from last.pt; returns the epochs already done.

        Raises:
            ConfigError: the checkpoint is of other data or another config; names the first setting that differs.
            CheckpointError: missing or damaged.
        """
        path = self.out / LAST_CHECKPOINT
        state = load_checkpoint(path, self.placement.device)
        require_same_data(state, path, self.shards.dataset, self.shards.fingerprint, self.shards.root)
        _require_same_config(json.loads(state["config"]), json.loads(to_json(self.config)), path)
        if state["precision"] != self.placement.precision:
            raise ConfigError(
                f"{path} was trained in {state['precision']}, and this device would continue in {self.placement.precision}; "
                f"add --precision {state['precision']} where it is supported, or choose another --out"
            )
        self.model.load_state_dict(state["model"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.step.scaler.load_state_dict(state["scaler"])
        self.state = RunState(state["epochs_done"], state["best_accuracy"], state["best_epoch"])
        return self.state.epochs_done

    def close(self) -> None:
        """Frees the loaders."""
        for loader in self.loaders.values():
            loader.close()


def build_model(config: TrainConfig, num_classes: int, placement: Placement) -> Recogniser:
    """The network with weights drawn from the config's seed, on its device and in its memory layout."""
    torch.manual_seed(config.seed)
    pretrained = Path(config.model.pretrained) if config.model.pretrained else None
    model = build_recogniser(config.model.arch, num_classes, config.model.projection_dim, pretrained)
    memory_format = torch.channels_last if placement.channels_last else torch.contiguous_format
    return model.to(device=placement.device, memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def saved_loader(run: Path) -> str:
    """The loader that the run in folder `run` was trained with, by its name.

    Raises:
        UserError: its config is missing or damaged; names the path.
    """
    return str(read_json(run / CONFIG_FILE).get("data", {}).get("loader", "auto"))


def load_run(state: dict[str, Any], device: str) -> tuple[TrainConfig, Placement, Recogniser]:
    """The config, placement and trained network of a checkpoint, on `device` ("auto" chooses); an fp16 run is read as fp32 on a CPU."""
    config = from_dict(TrainConfig, {**json.loads(state["config"]), "device": device})
    config = replace(config, model=replace(config.model, pretrained=""))  # the checkpoint holds every weight
    if config.precision == "fp16" and resolve_device(device).type == "cpu":
        config = replace(config, precision="fp32")
    placement = resolve_placement(config)
    model = build_model(config, len(state["class_names"]), placement)
    model.load_state_dict(state["model"])
    return config, placement, model


def summary(result: RunResult) -> dict[str, Any]:
    """The result, labelled as honest figures must be, ready for JSON."""
    return {
        "last_epoch_no_tta": result.last.to_dict(),
        "last_epoch_flip_tta": result.last_flip_tta.headline(),
        f"best_on_{result.selection_split}_no_tta": {**result.best.headline(), "epoch": result.best_epoch},
        "split": result.report_split,
        "images_per_s": result.images_per_s,
        "data_wait_share": result.data_wait_share,
    }


def _require_same_config(saved: dict[str, Any], asked: dict[str, Any], path: Path, prefix: str = "") -> None:
    for name, value in asked.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict) and isinstance(saved.get(name), dict):
            _require_same_config(saved[name], value, path, f"{full}.")
        elif saved.get(name) != value and full not in _FREE_ON_RESUME:
            raise ConfigError(
                f"{path} was trained with {full}={saved.get(name)!r}, this command says {value!r}; use the same, or another --out"
            )
