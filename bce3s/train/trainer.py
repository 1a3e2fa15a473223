"""The loop: epochs of steps, evaluations and saves, from wherever the run is to its end."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bce3s.config import TrainConfig, to_json
from bce3s.device import Placement, apply_numerics, environment, resolve_placement
from bce3s.distributed import ALONE, World
from bce3s.evaluate import evaluate
from bce3s.interrupt import StopRequest
from bce3s.losses import build_loss, resolve_method
from bce3s.metrics import Accuracy, FeatureStatistics, confidence_kind
from bce3s.progress import TrainingProgress, is_live
from bce3s.progress.device_load import total_memory_bytes
from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, RunLog, read_metrics
from bce3s.step import TrainStep
from bce3s.throughput.waits import DataWaits, Occupancy, binding_sentence
from bce3s.train.build import BEST_CHECKPOINT, build_model, load_last, without_pretrained
from bce3s.train.geometry import measure_with_geometry
from bce3s.train.loaders import RunLoaders
from bce3s.train.means import all_finite
from bce3s.train.result import RunResult, summary
from bce3s.train.saves import Saves
from bce3s.train.selection import best_weights, resolve_selection
from bce3s.train.state import Cursor, RunState, require_same_start
from bce3s.train.telling import SPOKEN, Telling, epoch_line, step_line, told
from pipelines.durable import write_atomically
from pipelines.format import ShardSet
from pipelines.loaders import PlannedLoader, choose_loader
from pipelines.types import Batch, ConfigError, UserError


class TrainingError(UserError):
    """Training cannot go on; the checkpoint before still stands."""


class StoppedError(Exception):
    """The run was asked to stop and is saved: no failure, but not the end either.

    Attributes:
        signal_name: such as "SIGTERM".
        cursor: how far the run is.
    """

    def __init__(self, signal_name: str, cursor: Cursor) -> None:
        super().__init__(f"stopped by {signal_name} after {cursor}")
        self.signal_name, self.cursor = signal_name, cursor


class Trainer:
    """One run in one process, one of the ranks of `world`; all of them do the same in the same order."""

    def __init__(
        self,
        config: TrainConfig,
        shards: ShardSet,
        out: Path,
        console: Console,
        world: World = ALONE,
        *,
        stop: StopRequest | None = None,
        continues: bool = False,
        telling: Telling = SPOKEN,
    ) -> None:
        """Builds model, step and loaders.

        Args:
            config: of the run.
            shards: what it trains and evaluates on.
            out: its folder.
            console: what the main rank says.
            world: this process among its ranks.
            stop: heard from the start of the command on; by default from `fit` on.
            continues: `resume` comes next and brings every weight.
            telling: what is shown, tracked and recorded of it.

        Raises:
            UserError: shards of another data set, unknown names, a device or package that is missing.
        """
        # Opened before anything that can fail on one machine alone, so that the others hear of it at once.
        self._agreement = world.agreement()
        if shards.dataset != config.dataset:
            raise ConfigError(
                f"{shards.root} holds data set '{shards.dataset}', not '{config.dataset}'; name the right --shards or --dataset"
            )
        self.shards, self.out, self.world, self.telling = shards, out, world, telling
        self.console = console if world.is_main else Console(quiet=True)
        self.placement: Placement = resolve_placement(config, world.local_rank)
        apply_numerics(config)
        self.loader_choice = choose_loader(config.data, shards, self.placement.device)
        # From here on by its name: a continuation must not choose anew.
        self.config = config = resolve_method(replace(config, data=replace(config.data, loader=self.loader_choice.name)))
        self.train_counts_K = shards.class_counts("train")
        self.selection = resolve_selection(config, shards)
        try:
            self.model = build_model(without_pretrained(config) if continues else config, len(shards.class_names), self.placement)
            self.loss = build_loss(config.loss, torch.from_numpy(self.train_counts_K).to(self.placement.device))
            self.step = TrainStep(self.model, self.loss, config, self.placement, world)
            with self.console.status("opening shards") if is_live(self.console) and not telling.quiet else nullcontext():
                splits = ("train", self.selection.split, self.selection.report_split)
                self.loaders = RunLoaders(config, shards, splits, self.placement.device, world)
        except torch.OutOfMemoryError:
            raise self._too_large() from None
        self.state = RunState(config, shards, self.step, world)
        self.saves = Saves(out, config.checkpoint, self.state, world, self._say_loudly)
        self._said_data_binds = False
        self._stop = stop or StopRequest()
        self._agreement.exchange(False, False)
        self._agreement.settle()  # everybody is ready

    def resume(self) -> Cursor:
        """Continues from the newest whole checkpoint; says which damaged ones it passed over.

        Raises:
            ConfigError: the checkpoint is of other data or another config; names the first setting that differs.
            CheckpointError: there is none, or all are damaged.
        """
        loaded = load_last(self.out)  # on the CPU, and copied into place: a device has no room for it twice
        for sentence in loaded.skipped:
            self._say_loudly(sentence)
        self.state.load(loaded.state, loaded.path)
        self.saves.begin()
        return self.state.cursor

    def fit(self) -> RunResult:
        """Trains from where the run is to the last epoch, then evaluates with and without flip TTA.

        Raises:
            StoppedError: SIGTERM or SIGINT asked for it; the run is saved.
            TrainingError: a loss that is not finite, no device memory, or a disk that cannot be written.
        """
        try:
            with self._stop:
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
            f"{self.placement.device} ran out of memory at batch size {config.batch_size}; take a smaller --batch-size "
            f"or --set accumulate_steps={2 * self.config.accumulate_steps}{other}"
        )

    def _fit(self) -> RunResult:
        require_same_start(self.model, self.world, self.config, self.shards)
        cursor = self.state.cursor
        if self.world.is_main:
            if not cursor.global_step:
                # Of a run that is being overwritten; the record comes after, so that what it says is true of what lies beside it.
                self.saves.folder.clear()
                (self.out / BEST_CHECKPOINT).unlink(missing_ok=True)
            self._write_record()
        num_steps = self.loaders["train"].num_steps
        # The other ranks write nothing: what they would say, the main one says.
        folder = self.out if self.world.is_main else None
        place = (self.console, self._say_loudly, self.placement.device)
        with told(folder, cursor, num_steps, self.telling, *place) as (log, progress):
            while cursor.epoch < self.config.epochs:
                line = self._train_epoch(log, progress)
                self._end_epoch(line, log, progress)
            self._stop_if_asked(self._agreed(self._stop.name is not None))
            result = self._final_result(progress)
            log.write({"kind": "summary", **summary(result)})
            if not log.complete:
                raise TrainingError(f"the run is trained and saved, but {self.out} has no room for its log; make room, then add --resume")
        return result

    def _write_record(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / CONFIG_FILE, to_json(self.config).encode())
        record = {
            **environment(self.placement.device),
            "precision": self.placement.precision,
            "world_size": self.world.size,
            "job": self.world.job,
            "shards": self.shards.address,
            "fingerprint": self.shards.fingerprint,
            "loss_floors": self.loss.floors(len(self.train_counts_K)),
            "gpu_memory_bytes": total_memory_bytes(self.placement.device),
            "command": self.telling.command,
        }
        write_atomically(self.out / ENVIRONMENT_FILE, json.dumps(record, indent=1).encode())

    def _train_epoch(self, log: RunLog, progress: TrainingProgress) -> dict[str, Any]:
        """The rest of the epoch in progress; returns its log line."""
        self.model.train()
        cursor, means, loader = self.state.cursor, self.state.means, self.loaders.of_epoch(self.state.cursor.epoch)
        waits = DataWaits(self._batches(loader), self.placement.device)
        began_s = logged_s = time.perf_counter() - cursor.epoch_s
        logged_images = cursor.epoch_images
        for batch in waits:
            means.add(self.step(batch, loader.num_steps), batch.step)
            cursor.step, cursor.global_step = batch.step + 1, cursor.global_step + 1
            cursor.epoch_images += batch.num_sources * self.world.size
            progress.advance(cursor.step)
            if cursor.step % self.config.log_every == 0:
                values, now_s = self._finite(means.recent(), log), time.perf_counter()
                cursor.epoch_s = now_s - began_s
                rates = {"images_per_s": (cursor.epoch_images - logged_images) / (now_s - logged_s), **asdict(waits.recent())}
                log.write(step_line(cursor, self.config.epochs, loader.num_steps, rates, self.loss.views, self.placement.device) | values)
                logged_s, logged_images = now_s, cursor.epoch_images
            cursor.epoch_s = time.perf_counter() - began_s
            stop, save = self._agreement.exchange(self._stop.name is not None, self.saves.ask())
            self._stop_if_asked(stop)
            if save:
                self.saves.save()
        self._agreement.settle()
        self.saves.forget_asking()
        values = self._finite(means.epoch(), log)
        cursor.epoch_s, occupancy = time.perf_counter() - began_s, waits.total()
        self._say_if_data_binds(occupancy)
        rates = {"images_per_s": cursor.epoch_images / cursor.epoch_s, **asdict(occupancy)}
        return epoch_line(cursor, self.config.epochs, loader.num_steps, rates, self.loss.views) | values

    def _batches(self, loader: PlannedLoader) -> Iterator[Batch]:
        """The rest of the epoch."""
        with self.loaders.at_fault():
            yield from loader.epoch(self.state.cursor.epoch, self.state.cursor.step)

    def _end_epoch(self, line: dict[str, Any], log: RunLog, progress: TrainingProgress) -> None:
        """Evaluation where it is due, the epoch's line, and a save where that is due."""
        cursor, epoch = self.state.cursor, self.state.cursor.epoch
        accuracy, began_s = None, time.perf_counter()
        if (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs:
            self._stop_if_asked(self._agreed(self._stop.name is not None))
            with self.state.rank_average():
                accuracy = self._evaluate(self.selection.split, progress)["plain"]
                if self.selection.score(accuracy) > cursor.best_accuracy:
                    cursor.best_accuracy, cursor.best_epoch = self.selection.score(accuracy), epoch
                    self.saves.keep_best()
        figures = {"eval_s": time.perf_counter() - began_s, **accuracy.headline()} if accuracy else {}
        log.write({**line, "split": self.selection.split, **figures})
        cursor.next_epoch()
        self.state.means.clear()
        if cursor.epoch == self.config.epochs:
            failures = self.saves.save_and_wait()
            if failures:
                raise TrainingError(f"the trained network could not be saved: {failures[0]}; mend that, then add --resume to continue")
        elif self._agreed(self.saves.due):
            self.saves.save()

    def _agreed(self, flag: bool) -> bool:
        """Whether any rank raises `flag`; waits for all of them."""
        return bool(self.world.sum(torch.tensor(int(flag), device=self.placement.device)).item()) if self.world.size > 1 else flag

    def _stop_if_asked(self, stop: bool) -> None:
        """Saves what is not saved yet and ends the run, on every rank after the same step."""
        if not stop:
            return
        failures = self.saves.save_and_wait() if self.state.cursor.epoch < self.config.epochs else []
        if failures:
            raise TrainingError(f"the run was asked to stop and could not be saved: {failures[0]}; --resume continues at the save before")
        raise StoppedError(self._stop.name or "another rank", self.state.cursor)

    def _say_loudly(self, sentence: str) -> None:
        self.console.print(sentence, style="bold red", highlight=False, soft_wrap=True)

    def _say_if_data_binds(self, occupancy: Occupancy) -> None:
        """Once a run: an epoch that waited for data is explained; later ones would only repeat it."""
        if self._said_data_binds:
            return
        split = self.shards.split("train")
        stored_side = float(np.median(np.minimum(split.heights_N, split.widths_N)))
        sentence = binding_sentence(occupancy, self.loader_choice, self.config.data, stored_side)
        if sentence and not self.telling.quiet:
            self._said_data_binds = True
            self.console.print(sentence, highlight=False, soft_wrap=True)

    def _finite(self, values: dict[str, float], log: RunLog) -> dict[str, float]:
        """`values`, or an error that names the first broken step and its samples; saves of a broken model are refused by the writer."""
        if all_finite(values):
            return values
        cursor, step = self.state.cursor, self.state.means.first_broken_step()
        step = cursor.step - 1 if step is None else step
        ids_S = self.loaders["train"].step_ids(cursor.epoch, step).tolist()
        log.write({"kind": "broken", "epoch": cursor.epoch, "step": step, "ids": ids_S})
        newest = self.saves.folder.newest()
        listed = ", ".join(map(str, ids_S[:8])) + (f" and {len(ids_S) - 8} more, in metrics.jsonl" if len(ids_S) > 8 else "")
        raise TrainingError(
            f"the loss is not finite from step {step + 1} of epoch {cursor.epoch + 1} on (samples {listed}); "
            f"{f'{newest} stands' if newest else 'nothing was saved yet'}; lower --lr or raise the warm-up"
        )

    def _evaluate(
        self, split: str, progress: TrainingProgress, *, flip_tta: bool = False, features: FeatureStatistics | None = None
    ) -> dict[str, Accuracy]:
        loader = self.loaders[split]

        def advanced(advance: Callable[[], None]) -> None:
            advance()
            if self.world.size == 1:  # several ranks stop together, after the evaluation
                self._stop_if_asked(self._stop.name is not None)

        with progress.activity(f"evaluating {split}", loader.num_steps) as advance, self.loaders.at_fault():
            return evaluate(
                *(self.model, loader, self.train_counts_K, self.config.data.augment, self.placement),
                flip_tta=flip_tta,
                on_step=lambda: advanced(advance),
                world=self.world,
                confidence=confidence_kind(self.config.loss),
                features=features,
            )

    def _final_result(self, progress: TrainingProgress) -> RunResult:
        cursor, selection = self.state.cursor, self.selection
        with self.state.rank_average():
            last, geometry = measure_with_geometry(
                lambda features: self._evaluate(selection.report_split, progress, flip_tta=True, features=features),
                *(self.model, self.train_counts_K, self.placement.device, self._say_loudly, self.world),
            )
            average = None
            if self.step.average is not None:
                with self.step.average.applied():
                    average = self._evaluate(selection.report_split, progress)["plain"]
            best: Accuracy | None = last["plain"]
            if cursor.best_epoch + 1 != self.config.epochs:
                last_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
                best = self._evaluate(selection.report_split, progress)["plain"] if self._load_best() else None
                self.model.load_state_dict(last_weights)
        epochs = [line for line in read_metrics(self.out) if line["kind"] == "epoch"]
        return RunResult(
            last=last["plain"],
            last_flip_tta=last["flip_tta"],
            last_features=geometry,
            best=best,
            best_epoch=cursor.best_epoch,
            last_average=average,
            selection_split=selection.split,
            selection_measure=selection.measure,
            selects=selection.selects,
            report_split=selection.report_split,
            images_per_s=statistics.median(line["images_per_s"] for line in epochs) if epochs else 0.0,
            data_wait_share=statistics.median(line["data_wait_share"] for line in epochs) if epochs else 0.0,
        )

    def _load_best(self) -> bool:
        """The weights of the best epoch into the model, where they are not lost; the main rank has them and hands them to the others."""
        weights = best_weights(self.saves, self.out, self.state.cursor.best_epoch, self._say_loudly) if self.world.is_main else None
        if not self._agreed(weights is not None):
            return False
        if weights is not None:
            self.model.load_state_dict(weights)
        for value in self.model.state_dict().values():
            if value.is_floating_point():
                self.world.sum(value if self.world.is_main else value.zero_())
        return True

    def close(self) -> None:
        """Frees the loaders and waits for what is being saved."""
        self.saves.close()
        self.loaders.close()
