"""The training step on a fixed batch: what each rung of speed brings, what each feature costs, and what a run does around it.

python benchmarks/step.py [PART …] [--device cuda] [--arch resnet50] [--image-size 224] [--batch-size 256] [--json FILE]

Parts, by default all:

ladder    eager fp32 with contiguous memory → channels-last → bf16 → compiled → CUDA graphs, each rung on top of those before except that
          "graphed" is not compiled; views/s, share of the measured peak (MFU), and the step's parts
features  what one more setting costs, as time over that of the same step without it (`--base` names the rung); "the base again" is the
          very same step built twice, and shows what the machine's noise alone makes of a ratio
saves     a checkpoint as often as the writer takes one, against none
host      host time of all that the training loop does between two steps
ranks     gloo ranks with a thread each, as processes of their own on this machine, against one process with the same work as one rank

Rows take turns, `--rounds` times, so that a machine whose speed drifts slows all; ratios are taken round by round. Beside the wall clock
stands this process's processor time, whose ratios other programs disturb less: with OMP_NUM_THREADS=1 and NUMBA_NUM_THREADS=1 it is all of
a CPU's step, on CUDA the host's part of it. Parts are timed by themselves, waiting for the device after each. What a graph holds is given
back after each turn, and captured anew before the next, so that rows share the device's memory. On CUDA, `features` sets
CUBLAS_WORKSPACE_CONFIG for all of its rows, because "deterministic" needs it. The cost of the loss by itself is benchmarks/loss.py's.

`PREDICTED` was written down before anything was measured, and is not to be mended afterwards: the outcome stands beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from step_around import measure_host, measure_saves
from step_bench import Bench, Figures, machine, ratios_to, sample_steps, spread, step_figures
from step_ranks import measure_ranks

from bce3s.cli import run_app
from bce3s.device import apply_numerics, resolve_device
from bce3s.graph import WARM_UP_STEPS, GraphedStep
from bce3s.step import TrainStep
from bce3s.throughput.rows import NEEDS_CUDA
from bce3s.throughput.step_parts import forward_flops, part_rows
from bce3s.throughput.step_rows import measured_peak
from bce3s.throughput.timing import Budget, Probe
from pipelines.config import require, require_choice
from pipelines.types import Batch

FP32, BF16 = "precision=fp32", "precision=bf16"
LAST, FIRST = "channels_last=on", "channels_last=off"
# The name of a rung → its settings, and whether the step is replayed as a CUDA graph.
RUNGS: dict[str, tuple[tuple[str, ...], bool]] = {
    "eager": ((FP32, FIRST), False),
    "channels-last": ((FP32, LAST), False),
    "bf16": ((BF16, LAST), False),
    "compiled": ((BF16, LAST, "compile=true"), False),
    "graphed": ((BF16, LAST), True),
    "compiled+graphed": ((BF16, LAST, "compile=true"), True),
}
FEATURES = {
    "the base again": (),
    "accumulate_steps=2": ("accumulate_steps=2",),
    "ema_decay=0.999": ("ema_decay=0.999",),
    "clip_norm=1": ("optimizer.clip_norm=1.0",),
    "deterministic": ("deterministic=true",),
    "adamw": ("optimizer.name=adamw",),
    "lars": ("optimizer.name=lars",),
    "loss read every step": (),
}
PARTS = ("ladder", "features", "saves", "host", "ranks")
EXTRAS = ("saves_per_step", "save_call_ms", "saved_mb", "exchange_ms", "ratio_to_side_by_side")
SMALL_SIDE = 64  # in pixels: up to here the predictions are those for CIFAR's networks

# Written before the first measurement. Ladder: views/s over those of "eager". All others: time over that of the row they are compared with,
# but of host the share of a step.
_COSTS = ("accumulate_steps=2", "ema_decay=0.999", "clip_norm=1", "deterministic", "adamw", "lars", "loss read every step")
PREDICTED: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    ("cpu", "small"): {
        "ladder": {"channels-last": 1.15, "bf16": 1.7, "compiled": 1.3},
        "features": dict(zip(_COSTS, (1.05, 1.01, 1.01, 1.05, 1.01, 1.03, 1.00), strict=True)),
        "saves": {"saving": 1.08},
        "host": {"all of it": 0.002},
        "ranks": {"side by side": 1.05, "ranks": 1.10, "ranks, sync_batch_norm": 1.25},
    },
    ("cpu", "large"): {
        "ladder": {"channels-last": 1.3, "bf16": 2.5, "compiled": 2.4},
        "features": dict(zip(_COSTS, (1.08, 1.03, 1.02, 1.05, 1.05, 1.05, 1.00), strict=True)),
        "saves": {"saving": 1.15},
        "host": {"all of it": 0.0003},
        "ranks": {"side by side": 1.08, "ranks": 1.20, "ranks, sync_batch_norm": 1.25},
    },
    ("cuda", "small"): {
        "ladder": {"channels-last": 0.95, "bf16": 0.9, "compiled": 1.3, "graphed": 2.5, "compiled+graphed": 3.5},
        "features": dict(zip(_COSTS, (1.6, 1.02, 1.03, 1.05, 1.01, 1.15, 1.10), strict=True)),
        "saves": {"saving": 1.10},
        "host": {"all of it": 0.02},
        "ranks": {},
    },
    ("cuda", "large"): {
        "ladder": {"channels-last": 1.25, "bf16": 2.3, "compiled": 2.7, "graphed": 2.3, "compiled+graphed": 2.7},
        "features": dict(zip(_COSTS, (1.03, 1.01, 1.01, 1.10, 1.01, 1.02, 1.03), strict=True)),
        "saves": {"saving": 1.05},
        "host": {"all of it": 0.002},
        "ranks": {},
    },
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class StepProbe:
    """One row's step as a probe; replayed as a graph where asked, and leaving the device's memory as it found it."""

    def __init__(self, step: TrainStep, batch: Batch, *, graphed: bool = False, read: bool = False) -> None:
        self.step = step
        self._batch, self._graphed, self._read = batch, graphed, read
        self._graphs: GraphedStep | None = None

    def probe(self) -> Probe:
        """For `sample_in_turns`."""
        return Probe(work=self._work, settle=self._settle, leave=self._leave)

    def _work(self) -> int:
        if self._graphed:
            # Beside the step instead of in it, so that it can be dropped after a turn: a captured step keeps all of its memory.
            self._graphs = self._graphs or GraphedStep(self.step.apply, self.step.placement.device)
            self.step.schedule(self._batch, 1)
            self._graphs(self._batch, None)
        else:
            terms = self.step(self._batch, 1)
            if self._read:
                float(terms["total"])
        return len(self._batch.ids_S)

    def _settle(self) -> None:
        apply_numerics(self.step.config)
        if self.step.placement.device.type == "cuda":
            for _ in range(WARM_UP_STEPS + 1 if self._graphed else 1):
                self._work()

    def _leave(self) -> None:
        if self.step.config.deterministic:
            torch.use_deterministic_algorithms(False)
        if self.step.placement.device.type == "cuda":
            self._graphs = None
            self.step.optimizer.zero_grad(set_to_none=True)  # gradients lie in the graph's memory
            torch.cuda.empty_cache()


def measure_ladder(bench: Bench, budget: Budget, rungs: tuple[str, ...]) -> dict[str, Figures]:
    """Every rung's step time, views/s, ratio to the first of them, MFU and parts; of a rung that could not be measured the reason."""
    batch = bench.batch()
    on_cuda = batch.images_SHWC.device.type == "cuda"
    rows: dict[str, Figures] = {name: {"reason": NEEDS_CUDA} for name in rungs}
    runs = {}
    for name in rungs:
        settings, graphed = RUNGS[name]
        if on_cuda or not graphed:
            runs[name] = StepProbe(bench.step(*settings), batch, graphed=graphed)
    apply_numerics(bench.config())
    outcomes, processor_ms = sample_steps({name: run.probe() for name, run in runs.items()}, budget, batch.images_SHWC.device)
    peaks = {run.step.placement.dtype: run.step.placement for run in runs.values()}
    peaks_flops = {dtype: peak_of(placement, budget) for dtype, placement in peaks.items()}
    base = next((name for name, rates in outcomes.items() if not isinstance(rates, str)), "")
    for name, rates in outcomes.items():
        if isinstance(rates, str):
            rows[name] = {"reason": rates}
            continue
        step = runs[name].step
        flops_per_view, peak = forward_flops(step, bench.image_size), peaks_flops[step.placement.dtype]
        rows[name] = step_figures(rates, bench.batch_size)
        rows[name] |= ratios_to(as_rates(outcomes[base]), rates, "ratio")
        rows[name] |= spread("processor_ms", processor_ms[name]) | ratios_to(processor_ms[name], processor_ms[base], "processor_ratio")
        rows[name] |= {"peak_flop_per_s": peak, "mfu": 3 * flops_per_view * rows[name]["views_per_s"] / peak if peak else None}
        # A graph is one replay: it has no parts.
        rows[name]["parts_ms"] = {} if RUNGS[name][1] else parts_ms(step, batch, budget)
    return rows


def as_rates(outcome: tuple[float, ...] | str) -> tuple[float, ...]:
    """The rates of a row that is known to have been measured."""
    assert not isinstance(outcome, str), outcome
    return outcome


def peak_of(placement: Any, budget: Budget) -> float:
    """FLOP/s of one large matrix product in a placement's precision."""
    workload: Any = SimpleNamespace(device=placement.device, placement=placement)
    return measured_peak(workload, budget)


def parts_ms(step: TrainStep, batch: Batch, budget: Budget) -> dict[str, float | None]:
    """Median milliseconds of every part of a step."""
    rows = part_rows(step, batch, 1, budget)
    parts = {row.key.partition(".")[2]: 1e3 * len(batch.ids_S) / row.median if row.rates else None for row in rows}
    step.optimizer.zero_grad(set_to_none=True)
    return parts


def measure_features(bench: Bench, budget: Budget, base: str) -> dict[str, Figures]:
    """Time of a step with each feature over that of the base row; of a row that could not be measured the reason."""
    settings, _ = RUNGS[base]
    batch = bench.batch()
    apply_numerics(bench.config(*settings))
    runs = {base: StepProbe(bench.step(*settings), batch)}
    for name, extra in FEATURES.items():
        runs[name] = StepProbe(bench.step(*settings, *extra), batch, read=name == "loss read every step")
    outcomes, processor_ms = sample_steps({name: run.probe() for name, run in runs.items()}, budget, batch.images_SHWC.device)
    base_rates = outcomes[base]
    rows: dict[str, Figures] = {}
    for name, rates in outcomes.items():
        if isinstance(rates, str) or isinstance(base_rates, str):
            rows[name] = {"reason": rates if isinstance(rates, str) else f"the base: {base_rates}"}
        else:
            rows[name] = step_figures(rates, bench.batch_size) | ratios_to(rates, base_rates, "ratio")
            rows[name] |= spread("processor_ms", processor_ms[name]) | ratios_to(processor_ms[base], processor_ms[name], "processor_ratio")
    return rows


def show(title: str, rows: dict[str, Figures], predicted: dict[str, float]) -> None:
    """One line a row; a prediction stands beside the outcome."""
    print(f"\n{title}")
    for name, row in rows.items():
        if "reason" in row:
            print(f"  {name:24} {row['reason']}", flush=True)
            continue
        text = f"  {name:24} {row['step_ms']:9.3f} ms ({row['step_ms_min']:.3f} to {row['step_ms_max']:.3f}, n = {row['n']})"
        text += f", {row['views_per_s']:7.0f} views/s" if "views_per_s" in row else ""
        text += f", ratio {row['ratio']:.4g} ({row['ratio_min']:.4g} to {row['ratio_max']:.4g})" if "ratio" in row else ""
        text += f", predicted {predicted[name]:g}" if name in predicted else ""
        if "processor_ms" in row:
            text += f"; processor {row['processor_ms']:.1f} ms, ratio {row['processor_ratio']:.3f}"
            text += f" ({row['processor_ratio_min']:.3f} to {row['processor_ratio_max']:.3f})"
        text += f", MFU {row['mfu']:.0%}" if row.get("mfu") else ""
        parts = {part: value for part, value in row.get("parts_ms", {}).items() if value}
        text += f"; {', '.join(f'{part} {value:.1f}' for part, value in parts.items())} ms" if parts else ""
        extra = {key: value for key, value in row.items() if key in EXTRAS}
        text += "".join(f", {key} {value:.3g}" for key, value in extra.items())
        print(text, flush=True)


def measured(
    bench: Bench, budget: Budget, rungs: tuple[str, ...], base: str, num_ranks: int
) -> dict[str, Callable[[], dict[str, Figures]]]:
    """How each part is measured."""
    settings = RUNGS[base][0]
    return {
        "ladder": lambda: measure_ladder(bench, budget, rungs),
        "features": lambda: measure_features(bench, budget, base),
        "saves": lambda: measure_saves(bench, budget, settings),
        "host": lambda: measure_host(bench, budget, settings),
        "ranks": lambda: measure_ranks(bench, budget, settings, num_ranks),
    }


def chosen(parts: list[str] | None) -> Iterator[str]:
    """The parts asked for, in the order of the tables.

    Raises:
        ConfigError: one that there is not.
    """
    for part in parts or ():
        require_choice("part", part, PARTS)
    yield from (part for part in PARTS if not parts or part in parts)


@app.command()
def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"What to measure: {', '.join(PARTS)}; default all.")] = None,
    device_name: Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")] = "auto",
    arch: Annotated[str, typer.Option(help="Backbone, such as resnet20-cifar or resnet50.")] = "resnet20-cifar",
    image_size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 32,
    batch_size: Annotated[int, typer.Option(help="B; a step trains on 3·B views.")] = 64,
    classes: Annotated[int, typer.Option(help="K.")] = 100,
    rungs: Annotated[str, typer.Option(help="Rungs of the ladder, by commas; empty takes all.")] = "",
    base: Annotated[str, typer.Option(help="The rung that features, saves, host and ranks stand on.")] = "bf16",
    ranks: Annotated[int, typer.Option(help="Number of gloo ranks.")] = 2,
    rounds: Annotated[int, typer.Option(help="Measurements of each row.")] = 7,
    seconds: Annotated[float, typer.Option(help="Length of a measurement at least; a step that takes longer is one.")] = 1.0,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting, of every row: --set model.projection_dim=64.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, after every part.")] = None,
) -> None:
    """Measure the parts asked for and print a table each."""
    asked = tuple(name.strip() for name in rungs.split(",") if name.strip()) or tuple(RUNGS)
    for name in (*asked, base):
        require_choice("rung", name, tuple(RUNGS))
    require(not RUNGS[base][1], "--base names a rung without a graph")
    todo = tuple(chosen(parts))
    device = resolve_device(device_name)
    if device.type == "cuda" and "features" in todo:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    bench = Bench(
        arch=arch, image_size=image_size, batch_size=batch_size, num_classes=classes, device=device_name, settings=tuple(settings or ())
    )
    budget = Budget(repeats=rounds, seconds=seconds)
    options = {"arch": arch, "image_size": image_size, "batch": batch_size, "classes": classes, "base": base, "settings": bench.settings}
    figures: Figures = {**machine(device), **options}
    predicted = PREDICTED[device.type, "small" if image_size <= SMALL_SIDE else "large"]
    print(", ".join(f"{name} {value}" for name, value in figures.items() if value != ()))
    for part, measure in measured(bench, budget, asked, base, ranks).items():
        if part in todo:
            load_average = os.getloadavg()[0]
            rows = measure()
            figures[part] = {"rows": rows, "predicted": predicted[part], "load_average_before": load_average}
            show(f"{part}, load average {load_average:.1f} before", rows, predicted[part])
            if json_file is not None:
                json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_app(app)
