"""The steps that are compared, the share of the device's peak that they reach, and the whole step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from bce3s.graph import WARM_UP_STEPS
from bce3s.step import TrainStep
from bce3s.throughput.rows import VIEWS_PER_DECODED, Row
from bce3s.throughput.timing import MEASURED_FAILURES, Budget, Probe, reason_of, sample
from bce3s.throughput.workload import Workload
from pipelines.types import BackendError, Batch

STEP_SKIPPED = "compiling takes long on a CPU; add --compile"


def build_steps(workload: Workload, *, compiled: bool) -> dict[str, TrainStep]:
    """The step of each row "step.*" that is measured, and of the run's own in any case."""
    steps = {
        "step.contiguous": workload.step(channels_last=False, compiled=False),
        "step.channels_last": workload.step(channels_last=True, compiled=False),
    }
    if compiled or workload.config.compile:
        steps["step.compiled"] = workload.step(channels_last=workload.placement.channels_last, compiled=True)
    if workload.step_key == "step.graph":
        config = workload.config
        steps["step.graph"] = workload.step(channels_last=workload.placement.channels_last, compiled=config.compile, graphed=True)
    return steps


def measured_peak(workload: Workload, budget: Budget) -> float:
    """FLOP/s of one large matrix product in the run's precision on its device: the most that convolutions can hope for; 0 if it fails.

    In fp32 on CUDA that is TF32 where cuDNN's convolutions take it, which torch allows them and not matrix products by default.
    """
    device, side = workload.device, 8192 if workload.device.type == "cuda" else 1024
    try:
        left, right = (torch.randn((side, side), device=device).to(workload.placement.dtype) for _ in range(2))
    except MEASURED_FAILURES:
        return 0.0

    def multiply() -> int:
        torch.matmul(left, right)
        return 1

    with multiplying_as_convolutions():
        outcome = sample(Probe(work=multiply), budget, device)
    return 0.0 if isinstance(outcome, str) else max(outcome) * 2.0 * side**3


@contextmanager
def multiplying_as_convolutions() -> Iterator[None]:
    """Matrix products on CUDA take TF32 inside if cuDNN's convolutions do."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def with_mfu(rows: list[Row], flops_per_view: float, peak: float) -> list[Row]:
    """The step rows with the share of the measured peak that they reach (MFU), three forward passes' worth of operations a view."""
    found = []
    for row in rows:
        if row.rates and row.key.startswith("step.") and peak:
            mfu = 3.0 * flops_per_view * VIEWS_PER_DECODED * row.median / peak
            figures = {"mfu": mfu, "flops_per_view_forward": flops_per_view, "measured_peak_flop_per_s": peak}
            row = replace(row, details={**row.details, **figures})
        found.append(row)
    return found


def graph_row(workload: Workload, batch: Batch, budget: Budget) -> Row:
    """The whole step as one CUDA graph; last, because a capture that fails may leave the device's state behind."""
    try:
        step = workload.step(channels_last=workload.placement.channels_last, compiled=False, graphed=True)
        for _ in range(WARM_UP_STEPS + 1):
            step(batch, 1)
    except (*MEASURED_FAILURES, BackendError) as error:
        return Row(key="step.graph", reason=reason_of(error))

    def replay() -> int:
        step(batch, 1)
        return len(batch.ids_S)

    outcome = sample(Probe(work=replay), budget, workload.device)
    return Row(key="step.graph", reason=outcome) if isinstance(outcome, str) else Row(key="step.graph", rates=outcome)
