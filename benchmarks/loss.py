"""The loss as it runs against the same terms in torch's words: time of forward and backward, and the uniform term's memory.

python benchmarks/loss.py [--device cuda] [--precision bf16] [--json FILE]

Both ways take turns, `--rounds` times, so that a machine whose speed drifts slows both; ratios are taken round by round, above 1 where
ours is faster or smaller. "loss" is the whole of BCE3S behind the backbone, products with the classifier and the projector
included; "joint" is its joint term from logits that are there, a copy of them included, because ours writes over them. Peak memory is what
a forward and backward pass of the uniform term needs beside the rows: on a CPU the growth of a fresh process, on CUDA the allocator's peak.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional
from turns import current_commit

from bce3s.cli import run_app
from bce3s.config import LossConfig
from bce3s.device import resolve_device
from bce3s.losses import LossInputs, MixedTargets
from bce3s.losses.bce3s import BCE3SLoss
from bce3s.losses.class_subset import draw_class_subset
from bce3s.losses.fused_bce import fused_bce
from bce3s.losses.terms import contrastive_bce, mixed_bce, source_bce, three_views, uniform_bce
from bce3s.losses.uniform import uniform_term
from bce3s.models import FeatureMemory, NormalizedClassifier, Projector

CLASS_COUNTS = (10, 100, 1000, 8142)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Work = Callable[[], object]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """What a step of this precision runs under."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def ways_of_the_loss(num_classes: int, dim: int, batch_size: int, precision: str, device: torch.device) -> dict[str, dict[str, Work]]:
    """The whole loss and its joint term, each in torch's words and as ours: one forward and backward pass."""
    torch.manual_seed(0)
    heads: Any = SimpleNamespace(
        classifier=NormalizedClassifier(dim, num_classes).to(device),
        projector=Projector(dim, 128).to(device),
        feature_memory=FeatureMemory(num_classes, 128).to(device),
    )
    heads.feature_memory.rows_KP.normal_()
    heads.feature_memory.filled_K.fill_(True)
    features_VD = torch.randn(3 * batch_size, dim, device=device, requires_grad=True)
    labels_B, partner_labels_B = torch.randint(0, num_classes, (2, batch_size), device=device)
    targets, key = MixedTargets(labels_B, partner_labels_B, torch.tensor(0.3, device=device)), torch.tensor(7, device=device)
    inputs = LossInputs(
        features_VD=features_VD,
        mixup=targets,
        cutmix=targets,
        heads=heads,
        epoch=1,
        num_epochs=2,
        progress=key * 0.0,
        batch_labels_G=labels_B,
        draw_key=key,
    )
    config = LossConfig()
    loss = BCE3SLoss(config, torch.ones(num_classes, dtype=torch.int64, device=device))
    parameters = [features_VD, *heads.classifier.parameters(), *heads.projector.parameters()]
    mask_K = draw_class_subset(labels_B, num_classes, config.negative_ratio, key)
    with torch.no_grad(), autocast(device, precision):
        logits_VK = heads.classifier(features_VD)
    leaf_VK = torch.zeros_like(logits_VK, requires_grad=True)

    def joint(logits_VK: torch.Tensor) -> torch.Tensor:
        source_BK, mixup_BK, cutmix_BK = logits_VK.chunk(3)
        return (source_bce(source_BK, labels_B, mask_K) + mixed_bce(mixup_BK, targets) + mixed_bce(cutmix_BK, targets)) / 3

    def reference() -> torch.Tensor:
        mask_K.copy_(draw_class_subset(labels_B, num_classes, config.negative_ratio, key))
        rows_KP, filled_K = heads.feature_memory.normalized(), heads.feature_memory.filled_K
        _, mixup_BP, cutmix_BP = heads.projector(features_VD).chunk(3)
        contrastive = contrastive_bce(mixup_BP, rows_KP, targets, 1.0, 64.0, filled_K)
        contrastive = contrastive + contrastive_bce(cutmix_BP, rows_KP, targets, 1.0, 64.0, filled_K)
        return joint(heads.classifier(features_VD)) + 0.1 * contrastive + uniform_bce(heads.classifier.normalized_weight())

    def with_gradient(total: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Work:
        def work() -> object:
            with autocast(device, precision):
                value = total()
            return torch.autograd.grad(value, inputs)

        return work

    return {
        "loss": {"reference": with_gradient(reference, parameters), "ours": with_gradient(lambda: loss(inputs).total, parameters)},
        "joint": {
            "reference": with_gradient(lambda: joint(leaf_VK + logits_VK), [leaf_VK]),
            "ours": with_gradient(lambda: fused_bce(leaf_VK + logits_VK, three_views(inputs), mask_K, batch_size).mean(), [leaf_VK]),
        },
    }


def rows_of_uniform(num_classes: int, dim: int, device: torch.device) -> torch.Tensor:
    """Random normalised rows [K, D] that want a gradient."""
    return functional.normalize(torch.randn(num_classes, dim, device=device), dim=1).requires_grad_()


def ways_of_uniform(rows_KD: torch.Tensor, precision: str) -> dict[str, Work]:
    """One forward and backward pass, dense and ours."""

    def pass_with(term: Callable[[torch.Tensor], torch.Tensor]) -> Work:
        def work() -> object:
            with autocast(rows_KD.device, precision):
                value = term(rows_KD)
            return torch.autograd.grad(value, rows_KD)

        return work

    return {"reference": pass_with(uniform_bce), "ours": pass_with(uniform_term)}


def time_s(work: Work, device: torch.device) -> float:
    """Seconds a call, over enough calls for a steady clock."""
    work_s, num_calls = 0.0, 0
    while num_calls < 1 or work_s < 0.05:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        work_s, num_calls = work_s + time.perf_counter() - started_s, num_calls + 1
    return work_s / num_calls


def compare(ways: dict[str, Work], rounds: int, device: torch.device) -> dict[str, float]:
    """Medians in ms, and the median and range of reference / ours over the rounds."""
    for work in ways.values():
        work()
    found = [{name: time_s(work, device) for name, work in ways.items()} for _ in range(rounds)]
    ratios = [one["reference"] / one["ours"] for one in found]
    medians = {f"{name}_ms": statistics.median(one[name] for one in found) * 1e3 for name in ways}
    return {**medians, "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "n": rounds}


def uniform_peak_bytes(way: str, num_classes: int, dim: int, precision: str, threads: int, device_name: str) -> int:
    """What one pass needs at its peak beside the rows; for a process of its own, whose peak was not higher before."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    # The libraries take their own memory at their first call.
    ways_of_uniform(rows_of_uniform(64, dim, device), precision)[way]()
    work = ways_of_uniform(rows_of_uniform(num_classes, dim, device), precision)[way]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before_bytes
    before_bytes = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before_bytes


def status_bytes(field: str) -> int:
    """A size that Linux reports of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10


def measure_uniform(num_classes: int, dim: int, precision: str, rounds: int, device: torch.device) -> dict[str, float]:
    """Time and peak memory of both ways; memory from fresh processes, three of each."""
    figures = compare(ways_of_uniform(rows_of_uniform(num_classes, dim, device), precision), rounds, device)
    for way in ("reference", "ours"):
        peaks = []
        for _ in range(3):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                arguments = (way, num_classes, dim, precision, torch.get_num_threads(), str(device))
                peaks.append(pool.submit(uniform_peak_bytes, *arguments).result() / 1e6)
        figures |= {f"{way}_peak_mb": statistics.median(peaks), f"{way}_peak_mb_min": min(peaks), f"{way}_peak_mb_max": max(peaks)}
    return figures | {"memory_ratio": figures["reference_peak_mb"] / figures["ours_peak_mb"]}


@app.command()
def main(
    device_name: Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    batch_size: Annotated[int, typer.Option(help="B; the loss sees 3·B views.")] = 64,
    dim: Annotated[int, typer.Option(help="Features D of the loss.")] = 512,
    uniform_dim: Annotated[int, typer.Option(help="Features D of the uniform term by itself, at 8,142 classes; 0 leaves it out.")] = 2048,
    rounds: Annotated[int, typer.Option(help="Measurements of each way.")] = 7,
    threads: Annotated[int, typer.Option(help="torch threads on a CPU; 0 is torch's default.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure every number of classes, then the uniform term, and print a line each."""
    device = resolve_device(device_name)
    if threads:
        torch.set_num_threads(threads)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "batch": batch_size,
        "dim": dim,
        "uniform_dim": uniform_dim,
        "torch": torch.__version__,
        "commit": current_commit(),
    }
    for num_classes in CLASS_COUNTS:
        for name, ways in ways_of_the_loss(num_classes, dim, batch_size, precision, device).items():
            row = figures[f"{name}, {num_classes} classes"] = compare(ways, rounds, device)
            show(f"{name}, K = {num_classes}, B = {batch_size}, D = {dim}", row)
    if uniform_dim:
        row = figures["uniform"] = measure_uniform(CLASS_COUNTS[-1], uniform_dim, precision, rounds, device)
        show(f"uniform, K = {CLASS_COUNTS[-1]}, D = {uniform_dim}", row)
        print(f"  peak memory {row['reference_peak_mb']:.0f} → {row['ours_peak_mb']:.0f} MB, {row['memory_ratio']:.1f} times less")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def show(title: str, row: dict[str, float]) -> None:
    """One line: medians of both ways, and their ratio with its range."""
    times = f"{row['reference_ms']:9.2f} → {row['ours_ms']:9.2f} ms"
    print(f"{title:40} {times}, {row['ratio']:5.2f} × ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}, n = {row['n']:.0f})", flush=True)


if __name__ == "__main__":
    run_app(app)
