"""Loader `dali`: NVIDIA DALI decodes only each crop's region, resizes and flips; on the GPU where there is one.

Encoded images are views into the memory-mapped tars and reach DALI without a copy. Both streams of a step are one DALI batch. Crops and
flips come with the plan, so DALI draws no random numbers and CPU and GPU agree.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Generator, Iterator
from os import cpu_count
from typing import Any

import numpy as np
import torch

from pipelines.loaders.plan import BatchPlan
from pipelines.loaders.planned import PixelRequest
from pipelines.types import BackendError, ShardError

try:
    from nvidia.dali import Pipeline, fn, types
except ImportError as error:
    raise BackendError(
        f"loader 'dali' needs NVIDIA DALI, which cannot be imported here ({error}); "
        "run 'pip install nvidia-dali-cuda130' or take --loader resident"
    ) from error


def _define(request: PixelRequest) -> Any:
    """The graph: encoded bytes + window + flip → uint8 [S, image_size, image_size, 3]."""
    config = request.config
    on_gpu = request.device.type == "cuda"
    pipeline = Pipeline(
        batch_size=request.max_samples,
        num_threads=config.num_threads or cpu_count() or 1,
        device_id=(request.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=config.prefetch_batches,
        exec_dynamic=True,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", device="cpu", no_copy=True, dtype=types.UINT8, ndim=1)
        window = fn.external_source(name="window", device="cpu", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", device="cpu", dtype=types.INT32, ndim=0)
        decoder = "mixed" if on_gpu else "cpu"
        corner, extent = window[0:2], window[2:4]
        if request.training and config.augment.crop == "pad":
            # A padded crop reaches beyond the image, which the region decoder refuses; such images are small anyway.
            images = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
            images = fn.slice(images, corner, extent, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
        else:
            images = fn.decoders.image_slice(encoded, corner, extent, axes=[0, 1], device=decoder, output_type=types.RGB)
            images = fn.resize(images, size=[config.image_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=flip))
    pipeline.build()
    return pipeline


class DaliPixels:
    """Pixel source over a DALI pipeline whose iterations are scheduled by hand, so that an epoch can start and stop anywhere."""

    stored_size: int | None = None

    def __init__(self, request: PixelRequest) -> None:
        """Builds the pipeline and runs it empty once."""
        self._request = request
        self._depth = request.config.prefetch_batches
        self._start()

    def _start(self) -> None:
        self._pipeline = _define(self._request)
        # DALI's first scheduled run starts `prefetch_queue_depth` iterations at once. Spending them on one sample each makes every later
        # schedule start exactly one, whatever the length of the epoch.
        first = np.zeros(1, np.int64)
        windows = np.array([[0, 0, 1, 1]], np.int32)
        for _ in range(self._depth):
            self._feed(first, windows, np.zeros(1, np.int32))
        self._pipeline.schedule_run()
        for _ in range(self._depth):
            self._collect([])

    def _feed(self, ids_S: np.ndarray, windows_S4: np.ndarray, flips_S: np.ndarray) -> None:
        self._pipeline.feed_input("encoded", self._request.split.encoded(ids_S))
        self._pipeline.feed_input("window", windows_S4)
        self._pipeline.feed_input("flip", flips_S)

    def _collect(self, in_flight: list[np.ndarray]) -> torch.Tensor:
        on_gpu = self._request.device.type == "cuda"
        try:
            (images,) = self._pipeline.share_outputs(torch.cuda.current_stream(self._request.device) if on_gpu else None)
        except RuntimeError as error:
            raise self._decode_error(error, in_flight) from error
        # The dynamic executor hands the buffer over: it lives as long as the tensor, so nothing is copied.
        pixels = torch.from_dlpack(images.as_tensor())
        self._pipeline.release_outputs()
        return pixels

    def _decode_error(self, error: RuntimeError, in_flight: list[np.ndarray]) -> ShardError:
        """DALI names a sample by its place in the batch; this names it by its shard. The pipeline is rebuilt for the next epoch."""
        message = str(error)
        place = re.search(r"sample #?(\d+)|'#(\d+)'", message)
        self._start()
        reason = next((line.strip() for line in message.splitlines() if "decode" in line), message.splitlines()[0])
        if place is None or not in_flight:
            return ShardError(f"DALI could not decode a batch: {reason}")
        position = int(place.group(1) or place.group(2))
        names = sorted({self._request.split.describe(int(ids[position])) for ids in in_flight if position < len(ids)})
        return ShardError(
            f"DALI could not decode {' or '.join(names)} ({reason}); make the shards again, with --on-error skip if the source is damaged"
        )

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Keeps `prefetch_batches` iterations in flight; an abandoned stream collects and drops them."""
        in_flight: deque[BatchPlan] = deque()
        try:
            for plan in plans:
                self._feed(plan.ids_S, plan.windows_S4, plan.flips_S)
                self._pipeline.schedule_run()
                in_flight.append(plan)
                if len(in_flight) == self._depth:
                    yield self._next(in_flight)
            while in_flight:
                yield self._next(in_flight)
        finally:
            while in_flight:
                self._next(in_flight)

    def _next(self, in_flight: deque[BatchPlan]) -> tuple[BatchPlan, torch.Tensor]:
        try:
            pixels = self._collect([plan.ids_S for plan in in_flight])
        except ShardError:
            in_flight.clear()
            raise
        return in_flight.popleft(), pixels

    def close(self) -> None:
        """Frees DALI's threads and buffers."""
        del self._pipeline
