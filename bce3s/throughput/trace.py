"""A Chrome trace of some end-to-end steps with named ranges, also for NVTX on CUDA.

The ranges are put around the parts of one `TrainStep` object from outside, so that a run that is not traced pays nothing for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bce3s.step import TrainStep
from bce3s.throughput.timing import synchronize
from bce3s.throughput.workload import EndlessBatches, Workload
from pipelines.durable import replacing

DATA_WAIT = "data wait"
STEP_RANGES = {"views": "views", "features": "forward", "loss": "loss", "backward": "backward", "update": "optimizer"}
_WARM_UP_STEPS = 3

Arguments = ParamSpec("Arguments")
ResultT = TypeVar("ResultT")


def write_trace(workload: Workload, path: Path, num_steps: int = 10) -> None:
    """Trains `num_steps` steps on the run's loader and writes what happened; `path` appears whole or not at all.

    Raises:
        UserError: the loader cannot be built or fails.
        OSError: the file cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's tracer reports its own start and stop otherwise
    cuda = workload.device.type == "cuda"
    step = workload.step(channels_last=workload.placement.channels_last, compiled=workload.config.compile)
    loader = workload.loader()
    try:
        batches = EndlessBatches(loader, workload.first_epoch)
        for _ in range(_WARM_UP_STEPS):
            step(next(batches), batches.num_steps)
        synchronize(workload.device)
        put_ranges(step, cuda=cuda)
        draw = _ranged(batches.__next__, DATA_WAIT, cuda=cuda)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
            for _ in range(num_steps):
                step(draw(), batches.num_steps)
            synchronize(workload.device)
        with replacing(path) as file:
            recorded.export_chrome_trace(file.name)
    finally:
        loader.close()


def put_ranges(step: TrainStep, *, cuda: bool) -> None:
    """Names the parts of this object's steps; they compute what they did before."""
    for attribute, name in STEP_RANGES.items():
        setattr(step, attribute, _ranged(getattr(step, attribute), name, cuda=cuda))


def _ranged(function: Callable[Arguments, ResultT], name: str, *, cuda: bool) -> Callable[Arguments, ResultT]:
    def inside(*arguments: Arguments.args, **options: Arguments.kwargs) -> ResultT:
        with record_function(name), _nvtx(name, cuda=cuda):
            return function(*arguments, **options)

    return inside


@contextmanager
def _nvtx(name: str, *, cuda: bool) -> Iterator[None]:
    if not cuda:
        yield
        return
    with torch.cuda.nvtx.range(name):
        yield
