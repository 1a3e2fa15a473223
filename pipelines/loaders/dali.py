"""Loader `dali`: NVIDIA DALI decodes only each crop's region, resizes and flips; on the GPU where there is one.

Encoded images are views into the memory-mapped tars and reach DALI without a copy. Both streams of a step are one DALI batch. Crops and
flips come with the plan, so DALI draws no random numbers and CPU and GPU agree.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Generator, Iterator
from os import cpu_count
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.augment.geometry import FlipArray, WindowArray
from pipelines.format.reader import ByteArray, ShardSplit
from pipelines.loaders.plan import BatchPlan
from pipelines.loaders.planned import PixelRequest
from pipelines.types import BackendError, IntArray, ShardError, UserError

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
        """Builds the pipeline and runs it once on a tiny image."""
        self._request = request
        self._depth = request.config.prefetch_batches
        self._pipeline: Any = _primed(request)

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Keeps `prefetch_batches` iterations in flight, also while the caller works on the batch it was given."""
        if self._pipeline is None:
            self._pipeline = _primed(self._request)
        in_flight: deque[BatchPlan] = deque()
        try:
            for plan in plans:
                ready = self._collect(in_flight) if len(in_flight) == self._depth else None
                _schedule(self._pipeline, self._request.split.encoded(plan.ids_S), plan.windows_S4, plan.flips_S)
                in_flight.append(plan)
                if ready is not None:
                    yield ready
            while in_flight:
                yield self._collect(in_flight)
        finally:
            if in_flight:
                self._abandon(len(in_flight))

    def _collect(self, in_flight: deque[BatchPlan]) -> tuple[BatchPlan, torch.Tensor]:
        device = self._request.device
        try:
            (images,) = self._pipeline.share_outputs(torch.cuda.current_stream(device) if device.type == "cuda" else None)
        except RuntimeError as error:
            failed = [plan.ids_S for plan in in_flight]
            in_flight.clear()
            self._pipeline = None  # DALI gives up a pipeline after an error; the next epoch builds another
            raise explain_failure(error, self._request.split, np.unique(np.concatenate(failed))) from error
        # The dynamic executor hands the buffer over, ordered on the stream named above: it lives as long as the tensor, nothing is copied.
        pixels = torch.from_dlpack(images.as_tensor())
        self._pipeline.release_outputs()
        return in_flight.popleft(), pixels

    def _abandon(self, count: int) -> None:
        """Takes what is in flight out of the pipeline; a failure there is nobody's any more and only costs the pipeline."""
        try:
            for _ in range(count):
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
        except RuntimeError:
            self._pipeline = None

    def close(self) -> None:
        """Frees DALI's threads and buffers."""
        self._pipeline = None


def _schedule(pipeline: Any, encoded: list[ByteArray], windows_S4: WindowArray, flips_S: FlipArray) -> None:
    pipeline.feed_input("encoded", encoded)
    pipeline.feed_input("window", windows_S4)
    pipeline.feed_input("flip", flips_S)
    pipeline.schedule_run()


def _primed(request: PixelRequest) -> Any:
    """A built pipeline of which every later `schedule_run` starts exactly one iteration.

    DALI's first one starts `prefetch_queue_depth` iterations at once and fails if fewer were fed, so that many tiny images go first.
    """
    pipeline = _define(request)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    tiny = [np.frombuffer(buffer.getvalue(), np.uint8)]
    window, flip = np.array([[0, 0, 64, 64]], np.int32), np.zeros(1, np.int32)
    for _ in range(request.config.prefetch_batches - 1):
        pipeline.feed_input("encoded", tiny)
        pipeline.feed_input("window", window)
        pipeline.feed_input("flip", flip)
    _schedule(pipeline, tiny, window, flip)
    for _ in range(request.config.prefetch_batches):
        pipeline.share_outputs()
        pipeline.release_outputs()
    return pipeline


def explain_failure(error: RuntimeError, split: ShardSplit, ids: IntArray) -> UserError:
    """The user's error for DALI's, which does not say which sample failed: those of `ids` that do not decode on the host are named."""
    broken = [split.describe(int(i)) for i, encoded in zip(ids, split.encoded(ids), strict=True) if not _decodes(encoded)]
    if broken:
        return ShardError(f"{', '.join(broken[:5])} does not decode; the shard is damaged: copy it again or make the shards again")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[lines.index("encountered:") + 1] if "encountered:" in lines[:-1] else lines[0]
    return BackendError(f"DALI failed while decoding: {reason}")


def _decodes(encoded: ByteArray) -> bool:
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return False
    return True
