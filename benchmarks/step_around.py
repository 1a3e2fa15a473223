"""What a run does beside its steps: checkpoints that are written while it trains, and the host's work between two steps."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from step_bench import Bench, Figures, ratios_to, sample_steps, spread, step_figures

from bce3s.config import CheckpointConfig
from bce3s.device import apply_numerics
from bce3s.distributed import ALONE
from bce3s.progress import TrainingProgress
from bce3s.runlog import RunLog
from bce3s.step import TrainStep
from bce3s.throughput.timing import Budget, Probe, sample_in_turns, synchronize
from bce3s.throughput.waits import DataWaits
from bce3s.train.means import TermMeans
from bce3s.train.saves import Saves
from bce3s.train.state import RunState
from pipelines.types import Batch

NUM_CALLS = 500
"""Calls a measurement of the host's work; each takes microseconds."""


class SavedRun:
    """The training loop's step and save, without its data."""

    def __init__(self, bench: Bench, step: TrainStep, batch: Batch, folder: Path, every: str) -> None:
        counts_K = np.ones(bench.num_classes, np.int64)
        # All that a checkpoint says of the shards.
        names = tuple(map(str, range(bench.num_classes)))
        shards: Any = SimpleNamespace(dataset="synthetic", fingerprint="", class_names=names, class_counts=lambda split: counts_K)
        self._step, self._batch = step, batch
        self._state = RunState(step.config, shards, step, ALONE)
        self.complaints: list[str] = []
        self.saves = Saves(folder, CheckpointConfig(every=every), self._state, ALONE, self.complaints.append)
        self.num_steps = self.num_saves = 0
        self.save_call_s = 0.0

    def work(self) -> int:
        """A step, and a save if one is due."""
        self._state.means.add(self._step(self._batch, 1), 0)
        self._state.cursor.global_step += 1
        self.num_steps += 1
        if self.saves.ask():
            started_s = time.perf_counter()
            self.saves.save()
            self.save_call_s += time.perf_counter() - started_s
            self.num_saves += 1
        return len(self._batch.ids_S)

    def leave(self) -> None:
        """Until nothing is being written, so that the next in turn has the machine to itself."""
        self.saves.save_and_wait()


def measure_saves(bench: Bench, budget: Budget, settings: tuple[str, ...]) -> dict[str, Figures]:
    """Steps with a save whenever the one before is on disk, against the same steps without."""
    apply_numerics(bench.config(*settings))
    batch, step = bench.batch(), bench.step(*settings)
    with tempfile.TemporaryDirectory() as folder:
        run = SavedRun(bench, step, batch, Path(folder), "1step")

        def without() -> int:
            step(batch, 1)
            return len(batch.ids_S)

        probes = {"none": Probe(work=without), "saving": Probe(work=run.work, leave=run.leave)}
        outcomes, processor_ms = sample_steps(probes, budget, batch.images_SHWC.device)
        run.saves.close()
        newest = run.saves.folder.newest()
        saved_bytes = newest.stat().st_size if newest else 0
    bare, saving = outcomes["none"], outcomes["saving"]
    if isinstance(bare, str) or isinstance(saving, str) or run.complaints or not run.num_saves:
        return {
            "saving": {"reason": next((text for text in (bare, saving, *run.complaints) if isinstance(text, str)), "nothing was saved")}
        }
    rows = {"none": step_figures(bare, bench.batch_size), "saving": step_figures(saving, bench.batch_size)}
    rows["saving"] |= ratios_to(saving, bare, "ratio")
    rows["saving"] |= spread("processor_ms", processor_ms["saving"])
    rows["saving"] |= ratios_to(processor_ms["none"], processor_ms["saving"], "processor_ratio")
    rows["saving"] |= {
        "saves_per_step": run.num_saves / run.num_steps,
        "save_call_ms": run.save_call_s / run.num_saves * 1e3,
        "saved_mb": saved_bytes / 1e6,
    }
    return rows


def measure_host(bench: Bench, budget: Budget, settings: tuple[str, ...]) -> dict[str, Figures]:
    """Milliseconds a step that the host spends around it; "all of it" also as a share of the step.

    The terminal is drawn, into nothing. Ratios are to the median step of the same settings.
    """
    apply_numerics(bench.config(*settings))
    batch, step = bench.batch(), bench.step(*settings)
    device = batch.images_SHWC.device

    def train() -> int:
        step(batch, 1)
        return len(batch.ids_S)

    rates = sample_in_turns({"step": Probe(work=train)}, budget, device)["step"]
    if isinstance(rates, str):
        return {"step": {"reason": rates}}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nothing = stack.enter_context(Path(os.devnull).open("w"))
        console = Console(file=nothing, force_terminal=True, width=120)
        progress = stack.enter_context(TrainingProgress(console, step.config.epochs, 10**6, 0))
        log = stack.enter_context(RunLog(folder, 0, 0, print))
        run = SavedRun(bench, step, batch, folder, "1h")
        work = host_work(step, batch, run.saves, progress, log)
        found: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(budget.repeats):
            for name, (call, calls_per_step) in work.items():
                found[name].append(time_of_call_s(call) * calls_per_step * 1e3)
                synchronize(device)
        run.saves.close()
    rows = {name: {"n": budget.repeats, **spread("step_ms", values)} for name, values in found.items()}
    totals = [sum(values) for values in zip(*found.values(), strict=True)]
    figures = step_figures(rates, bench.batch_size)
    step_ms = statistics.median(2e3 * bench.batch_size / rate for rate in rates)
    shares = spread("ratio", [total / step_ms for total in totals])
    return {"step": figures, **rows, "all of it": {"n": budget.repeats, **spread("step_ms", totals), **shares}}


def host_work(
    step: TrainStep, batch: Batch, saves: Saves, progress: TrainingProgress, log: RunLog
) -> dict[str, tuple[Callable[[], object], float]]:
    """What `Trainer` does around each step: a call of it, and how many calls of it a step is charged with."""
    terms, means, agreement = step(batch, 1), TermMeans(), ALONE.agreement()
    waits = DataWaits(itertools.repeat(batch), batch.images_SHWC.device)
    batches = iter(waits)
    means.add(terms, 0)

    def write_line() -> None:
        means.add(terms, 0)
        values, occupancy = means.recent(), waits.recent()
        rates = {"images_per_s": 1.0, **asdict(occupancy)}
        log.write({"kind": "step", "epoch": 0, "step": 0, **rates, **values})
        progress.show_rates(1.0, occupancy.data_wait_share, values)

    return {
        "means.add": (lambda: means.add(terms, 0), 1.0),
        "waits": (lambda: next(batches), 1.0),
        "progress.advance": (lambda: progress.advance(0), 1.0),
        "agreement.exchange": (lambda: agreement.exchange(False, False), 1.0),
        "saves.ask": (saves.ask, 1.0),
        f"a log line, 1/{step.config.log_every}": (write_line, 1.0 / step.config.log_every),
    }


def time_of_call_s(call: Callable[[], object]) -> float:
    """Seconds, mean of many calls."""
    started_s = time.perf_counter()
    for _ in range(NUM_CALLS):
        call()
    return (time.perf_counter() - started_s) / NUM_CALLS
