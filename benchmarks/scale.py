"""How a training step grows with classes and ranks on CPUs: predicted from parts measured at one number of classes, then measured whole.

python benchmarks/scale.py [--classes 1000,10000,100000] [--uniform-samples 0] [--ranks 1,2] [--json FILE]

Every part is timed at each of `--base-classes` and grows from the nearest with its own unit (`UNITS`): that is the prediction, which is
printed before the first whole step runs. Each whole step then runs in fresh processes, one thread a rank. Times of computing are CPU time,
which other work on the machine disturbs little; a step is given in wall-clock too. docs/scale.md explains the model and has the figures.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch.nn import functional
from turns import current_commit

from bce3s.cli import run_app
from bce3s.config import LossConfig, ModelConfig, TrainConfig
from bce3s.device import resolve_placement
from bce3s.distributed import ALONE, World, join_world, leave_world
from bce3s.losses import MixedTargets, Share, build_loss
from bce3s.losses.class_subset import draw_class_subset, draw_classes
from bce3s.losses.fused_bce import fused_bce
from bce3s.losses.terms import contrastive_logits
from bce3s.losses.uniform import uniform_term
from bce3s.step import TrainStep
from bce3s.train import build_model
from pipelines.augment.mix import draw_mix
from pipelines.config import DataConfig, OrderConfig
from pipelines.order import SampleOrder
from pipelines.types import Batch

Work = Callable[[], object]
NUM_STEPS = 100  # of an epoch; only the learning rate sees it
ENOUGH_S = 3.0  # of measuring one thing
BASE_SAMPLES = 4096
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Sizes(NamedTuple):
    """What a step's cost depends on: K classes, B source images over W ranks, R classes of the uniform term (0: all), D and P."""

    classes: int
    batch: int
    ranks: int = 1
    uniform_samples: int = 0
    dim: int = 64
    projection: int = 64
    backbone_parameters: int = 0

    @property
    def views(self) -> float:
        """Of one rank."""
        return 3 * self.batch / self.ranks

    @property
    def uniform_rows(self) -> int:
        """Classes that the uniform term pairs."""
        return min(self.uniform_samples or self.classes, self.classes)

    @property
    def parameters(self) -> int:
        """Without the projector's few."""
        return self.backbone_parameters + self.classes * (self.dim + 1)


# What each part grows with, on one rank.
UNITS: dict[str, Callable[[Sizes], float]] = {
    "backbone": lambda sizes: sizes.views,
    "joint": lambda sizes: sizes.views * sizes.classes * sizes.dim,
    "contrastive": lambda sizes: 2 / 3 * sizes.views * sizes.classes * sizes.projection,
    "uniform": lambda sizes: sizes.uniform_rows**2 * sizes.dim / 2 / sizes.ranks,
    "rows": lambda sizes: sizes.classes * sizes.dim,
    "draw": lambda sizes: sizes.classes * sizes.dim,
    "subset": lambda sizes: sizes.classes * math.log2(sizes.classes),
    "memory": lambda sizes: sizes.classes * sizes.projection,
    "optimizer": lambda sizes: sizes.parameters,
}


def config_for(sizes: Sizes) -> TrainConfig:
    """The smallest network of the field on 32-px images, whole loss, fp32."""
    return TrainConfig(
        dataset="cifar10-lt",
        precision="fp32",
        device="cpu",
        data=DataConfig(batch_size=sizes.batch, image_size=32),
        model=ModelConfig(arch="resnet20-cifar", projection_dim=sizes.projection),
        loss=LossConfig(uniform_samples=sizes.uniform_samples),
    )


def batch_for(sizes: Sizes, rank: int = 0) -> Batch:
    """Noise with random labels, one rank's share."""
    generator = torch.Generator().manual_seed(rank)
    num_images = 2 * sizes.batch // sizes.ranks
    return Batch(
        images_SHWC=torch.randint(0, 256, (num_images, 32, 32, 3), dtype=torch.uint8, generator=generator),
        labels_S=torch.randint(0, sizes.classes, (num_images,), generator=generator),
        ids_S=np.arange(num_images),
        mix=torch.from_numpy(draw_mix(0, 1, 3, 32, DataConfig().augment)),
        epoch=1,
        step=3,
    )


def step_for(sizes: Sizes, world: World = ALONE) -> TrainStep:
    """A step on a fresh network whose feature memory is full."""
    config = config_for(sizes)
    placement = resolve_placement(config)
    model = build_model(config, sizes.classes, placement)
    model.feature_memory.rows_KP.normal_()
    model.feature_memory.filled_K.fill_(True)
    return TrainStep(model, build_loss(config.loss, torch.ones(sizes.classes, dtype=torch.int64)), config, placement, world)


def time_s(work: Work, clock: Callable[[], float] = time.process_time) -> float:
    """Median seconds of a call after one that warms up, which counts where it takes long."""
    times_s: list[float] = []
    while len(times_s) < 3 or (sum(times_s) < ENOUGH_S and len(times_s) < 50):
        started_s = clock()
        work()
        times_s.append(clock() - started_s)
        if times_s[0] > 10 * ENOUGH_S:
            return times_s[0]
    return statistics.median(times_s[1:])


# ---- the parts


def parts_of(step: TrainStep, sizes: Sizes) -> dict[str, Work]:
    """Each part of a step by itself, forward and backward."""
    model, batch = step.model, batch_for(sizes)
    labels_B, partner_labels_B = batch.labels_S.chunk(2)
    rows_KD = functional.normalize(torch.randn(sizes.classes, sizes.dim), dim=1).requires_grad_()
    features_VD = torch.randn(len(labels_B) * 3, sizes.dim, requires_grad=True)
    projections_VP = torch.randn(len(labels_B) * 2, sizes.projection, requires_grad=True)
    memory_KP = torch.randn(sizes.classes, sizes.projection)
    key, every_K = torch.tensor(7), torch.ones(sizes.classes, dtype=torch.bool)

    def targets(num_views: int) -> MixedTargets:
        return MixedTargets(labels_B.repeat(num_views), partner_labels_B.repeat(num_views), torch.tensor(0.3))

    def optimizer_step() -> None:
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        step.update()

    def remember() -> torch.Tensor:
        model.feature_memory.update(projections_VP[: len(labels_B)], labels_B)
        return model.feature_memory.normalized()

    return {
        "backbone": lambda: model.features(step.views(batch)).sum().backward(),
        "joint": lambda: fused_bce(functional.linear(features_VD, rows_KD), targets(3), every_K, len(labels_B)).mean().backward(),
        "contrastive": lambda: fused_bce(contrastive_logits(projections_VP, memory_KP, 1.0), targets(2), every_K).mean().backward(),
        "uniform": lambda: uniform_term(rows_KD, Share(), sizes.uniform_samples, key).backward(),
        "rows": lambda: model.classifier.normalized_weight().sum().backward(),
        "draw": lambda: rows_KD.index_select(0, draw_classes(key, sizes.classes, sizes.uniform_rows)).sum().backward(),
        "subset": lambda: draw_class_subset(labels_B, sizes.classes, 0.4, key),
        "memory": remember,
        "optimizer": optimizer_step,
    }


def measure_parts(sizes: Sizes) -> dict[str, float]:
    """CPU seconds of each part at these sizes, on one rank."""
    torch.set_num_threads(1)
    return {name: time_s(work) for name, work in parts_of(step_for(sizes), sizes).items()}


def predict(parts_s: dict[Sizes, dict[str, float]], sizes: Sizes) -> dict[str, float]:
    """Seconds of each part, in proportion to its unit at the nearest sizes that were measured."""
    base = min(parts_s, key=lambda each: abs(math.log(each.classes / sizes.classes)))
    grown = {name: seconds * UNITS[name](sizes) / UNITS[name](base) for name, seconds in parts_s[base].items()}
    # The classifier's rows are normalised twice, and drawn from where the uniform term has a sample only.
    return grown | {"rows": 2 * grown["rows"], "draw": grown["draw"] if sizes.uniform_rows < sizes.classes else 0.0}


# ---- whole steps


def run_ranks(work: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """What `work(world, …)` returns on each rank, processes of their own that are fresh."""
    port = _free_port()
    with ProcessPoolExecutor(num_ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_as_rank, work, rank, num_ranks, port, arguments) for rank in range(num_ranks)]
        return [future.result() for future in futures]


def _as_rank(work: Callable[..., Any], rank: int, num_ranks: int, port: int, arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = join_world("cpu")
    found = work(world, *arguments)
    leave_world()
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure_step(world: World, sizes: Sizes) -> dict[str, float]:
    """Seconds of a whole step: median of CPU, least by the wall's clock, which other work only lengthens; and the process's peak memory."""
    step, batch = step_for(sizes, world), batch_for(sizes, world.rank)
    wall_s: list[float] = []

    def work() -> None:
        started_s = time.perf_counter()
        step(batch, NUM_STEPS)
        wall_s.append(time.perf_counter() - started_s)

    # A fixed number where ranks must agree: the clock of one could end its turn before the other's.
    if world.size > 1:
        cpu_s = []
        for _ in range(6 if sizes.uniform_rows < 50_000 else 2):
            began_s = time.process_time()
            work()
            cpu_s.append(time.process_time() - began_s)
        found_s = statistics.median(cpu_s[1:])
    else:
        found_s = time_s(work)
    peak_bytes = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return {"cpu_s": found_s, "wall_s": min(wall_s), "peak_gb": peak_bytes / 1e9}


def measure_all_reduce(world: World, megabytes: int) -> float:
    """Wall-clock seconds to sum float32 values over all ranks."""
    values = torch.zeros(megabytes * 250_000)
    times_s = []
    for _ in range(12):
        started_s = time.perf_counter()
        world.sum(values)
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s[2:])


# ---- images


def measure_order(num_images: int, num_classes: int = 10_000) -> dict[str, float]:
    """CPU seconds of an epoch's order, both streams, and the bytes an image that grouping and order keep."""
    ranks_N = np.arange(num_images, dtype=np.float64)
    labels_N = (num_classes * (ranks_N / num_images) ** 3).astype(np.int64)  # long-tailed
    order = SampleOrder(labels_N, num_classes, 256, 0, OrderConfig())
    table = order._table
    kept = sum(array.nbytes for array in (table.samples_N, order.instance_epoch(0), order.partner_epoch(0)))
    return {"order_s": time_s(lambda: (order.instance_epoch(1), order.partner_epoch(1))), "bytes_per_image": kept / num_images}


@app.command()
def main(
    classes: Annotated[str, typer.Option(help="Numbers of classes K.")] = "1000,10000,100000",
    ranks: Annotated[str, typer.Option(help="Numbers of gloo ranks.")] = "1,2",
    bases: Annotated[str, typer.Option("--base-classes", help="Numbers of classes at which the parts are measured.")] = "8192,131072",
    uniform_samples: Annotated[int, typer.Option(help="R of the uniform term; 0 is all classes.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Source images a step over all ranks.")] = 32,
    images: Annotated[str, typer.Option(help="Numbers of images whose order is timed; empty leaves it out.")] = "100000,1000000,10000000",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure the parts, predict, measure whole steps, print a line each."""
    one_class = Sizes(2, batch_size)
    backbone = sum(p.numel() for p in build_model(config_for(one_class), 2, resolve_placement(config_for(one_class))).backbone.parameters())
    sizes_of_all = one_class._replace(backbone_parameters=backbone)
    commit = current_commit()
    figures: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "commit": commit}
    parts_s: dict[Sizes, dict[str, float]] = {}
    for base_classes in map(int, bases.split(",")):
        # A sample, so that every part is there; the pairs of all classes would take minutes at the larger base.
        base = sizes_of_all._replace(classes=base_classes, uniform_samples=BASE_SAMPLES)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts_s[base] = pool.submit(measure_parts, base).result()
        print(f"parts at K = {base_classes:,}:", {name: f"{1e3 * seconds:.2f} ms" for name, seconds in parts_s[base].items()}, flush=True)
    rank_counts = [int(text) for text in ranks.split(",")]
    transfer_s = {1: (0.0, 0.0)} | {count: fit_transfer(count) for count in rank_counts if count > 1}
    rows = []
    for num_classes in map(int, classes.split(",")):
        for count in rank_counts:
            sizes = sizes_of_all._replace(classes=num_classes, ranks=count, uniform_samples=uniform_samples)
            start_s, byte_s = transfer_s[count]
            parts = predict(parts_s, sizes)
            reduce_s = start_s + byte_s * 4 * sizes.parameters
            rows.append({"classes": num_classes, "ranks": count, "parts_s": parts, "cpu_s": sum(parts.values()), "reduce_s": reduce_s})
            print(f"predicted K = {num_classes:,}, {count} ranks: {rows[-1]['cpu_s']:.3f} s + {reduce_s:.3f} s of all-reduce")
    for row in rows:
        sizes = sizes_of_all._replace(classes=row["classes"], ranks=row["ranks"], uniform_samples=uniform_samples)
        found = run_ranks(measure_step, row["ranks"], sizes)
        row["measured"] = {name: max(each[name] for each in found) for name in found[0]} | {"load": os.getloadavg()[0]}
        show(row)
    figures["parts_ms"] = {base.classes: {name: 1e3 * seconds for name, seconds in found.items()} for base, found in parts_s.items()}
    figures |= {"transfer": {str(count): found for count, found in transfer_s.items()}, "rows": rows}
    figures["images"] = {number: measure_order(int(number)) for number in images.split(",") if number}
    print(figures["images"])
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def fit_transfer(num_ranks: int) -> tuple[float, float]:
    """Seconds to start an all-reduce and seconds a byte, from 1 and 64 MB."""
    small_s, large_s = (max(run_ranks(measure_all_reduce, num_ranks, megabytes)) for megabytes in (1, 64))
    byte_s = (large_s - small_s) / 63e6
    print(f"all-reduce over {num_ranks} ranks: 1 MB {small_s * 1e3:.2f} ms, 64 MB {large_s * 1e3:.1f} ms, {1e-9 / byte_s:.2f} GB/s")
    return max(0.0, small_s - byte_s * 1e6), byte_s


def show(row: dict[str, Any]) -> None:
    """Predicted against measured; on the loopback the all-reduce is work of the CPU as well."""
    measured, total_s = row["measured"], row["cpu_s"] + row["reduce_s"]
    print(
        f"K = {row['classes']:>9,}, {row['ranks']} ranks: predicted {total_s:8.3f} s, CPU {measured['cpu_s']:8.3f} s = "
        f"{total_s / measured['cpu_s']:.2f}; wall {measured['wall_s']:8.3f} s = {total_s / measured['wall_s']:.2f}; "
        f"peak {measured['peak_gb']:.1f} GB, load {measured['load']:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    run_app(app)
