"""Batches cut from a decoded split: on the host by threads, on a CUDA device by a kernel, or on the host and then uploaded."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from pipelines.augment.crop import StoredImages, crop_batch, crop_reference
from pipelines.augment.jitter import jitter_batch
from pipelines.augment.pixel_ops import upload
from pipelines.format.reader import ByteArray
from pipelines.loaders.plan import BatchPlan
from pipelines.loaders.planned import PixelRequest
from pipelines.loaders.resident_size import KeptSizes

PlannedPixels = Generator[tuple[BatchPlan, torch.Tensor], None, None]
# Crops of one piece of work: they are jittered while they are still in a core's cache.
_CHUNK_BYTES = 1 << 20
_KEPT_BUFFERS = 4


class Crops(Protocol):
    """Cuts batches from a decoded split; `PixelSource` without the decoding."""

    def stream(self, plans: Iterator[BatchPlan]) -> PlannedPixels:
        """Yields each plan with its crops, uint8 [S, image_size, image_size, 3] on the device."""
        ...

    def close(self) -> None:
        """Ends threads and frees buffers."""
        ...


class CropThreads:
    """Threads that cut one batch together, each some images at a time; none of them holds the GIL while it does.

    Not numba's own: its fallback layer must not be entered from two threads, and all of them are shared with the rest of the process.
    """

    def __init__(self, request: PixelRequest, pixels_P: ByteArray, sizes: KeptSizes) -> None:
        """Starts no thread yet.

        Args:
            request: sizes and the number of threads.
            pixels_P: uint8 [bytes], read-only, so that the compiled loop has one type of it.
            sizes: of the images in it.
        """
        self.image_size = request.config.image_size
        self._threads = request.num_threads
        self._stored = (pixels_P, sizes.offsets_N, sizes.heights_N, sizes.widths_N)
        self._pool = ThreadPoolExecutor(self._threads, "crop")

    def begin(self, plan: BatchPlan, crops_SHWC: ByteArray) -> list[Future[None]]:
        """Starts to fill uint8 [S, image_size, image_size, 3]; it must not be touched until all results are there."""
        num_samples = len(crops_SHWC)
        share = -(-num_samples // self._threads)
        chunk = max(1, min(share, max(8, _CHUNK_BYTES // (self.image_size**2 * 3))))
        rows = [slice(start, start + chunk) for start in range(0, num_samples, chunk)]
        return [self._pool.submit(self._fill, plan, crops_SHWC, part) for part in rows]

    def _fill(self, plan: BatchPlan, crops_SHWC: ByteArray, part: slice) -> None:
        crop_batch(*self._stored, plan.ids_S[part], plan.windows_S4[part], plan.flips_S[part], crops_SHWC[part])
        if plan.jitter_S3 is not None:
            jitter_batch(crops_SHWC[part], plan.jitter_S3[part])

    def close(self) -> None:
        """Ends the threads and lets go of the images."""
        self._pool.shutdown()
        self._stored = (np.empty(0, np.uint8), *self._stored[1:])


class HostCrops:
    """Crops delivered on the host. Memory of a batch comes back when nobody holds it any more: fresh pages cost a third of the crop."""

    def __init__(self, request: PixelRequest, pixels_P: ByteArray, sizes: KeptSizes) -> None:
        """Keeps the buffer, uint8 [bytes]."""
        self._threads = CropThreads(request, pixels_P, sizes)
        self._shape = (request.max_samples, request.config.image_size, request.config.image_size, 3)
        self._free: list[ByteArray] = []

    def stream(self, plans: Iterator[BatchPlan]) -> PlannedPixels:
        """Nothing runs ahead: a step on the host would only wait for the same cores."""
        for plan in plans:
            crops_SHWC = self._lend(len(plan.ids_S))
            wait_for(self._threads.begin(plan, crops_SHWC))
            yield plan, torch.from_numpy(crops_SHWC)
            del crops_SHWC  # else this frame would hold it for another batch

    def _lend(self, num_samples: int) -> ByteArray:
        whole = self._free.pop() if self._free else np.empty(self._shape, np.uint8)
        lent: ByteArray = whole[:num_samples]
        weakref.finalize(lent, _take_back, self._free, whole).atexit = False
        return lent

    def close(self) -> None:
        """Ends threads and frees buffers."""
        self._threads.close()
        self._free = []


def _take_back(free: list[ByteArray], whole: ByteArray) -> None:
    if len(free) < _KEPT_BUFFERS:
        free.append(whole)


def wait_for(work: list[Future[None]]) -> None:
    """Returns when all of it is done; raises what it raised."""
    for part in work:
        part.result()


class DeviceCrops:
    """Crops by one kernel from images in a CUDA device's memory; nothing runs ahead because nothing is waited for."""

    def __init__(self, request: PixelRequest, pixels_P: torch.Tensor, sizes: KeptSizes) -> None:
        """Keeps the buffer, uint8 [bytes] on the device."""
        self._device, self._image_size = pixels_P.device, request.config.image_size
        offsets_N, heights_N, widths_N = (upload(part, self._device) for part in (sizes.offsets_N, sizes.heights_N, sizes.widths_N))
        self._stored: StoredImages | None = StoredImages(pixels_P=pixels_P, offsets_N=offsets_N, heights_N=heights_N, widths_N=widths_N)
        self._crop = _device_kernel(self._device)

    def stream(self, plans: Iterator[BatchPlan]) -> PlannedPixels:
        """Uploads the plan and starts the kernel."""
        for plan in plans:
            assert self._stored is not None, "closed"
            numbers = (upload(part, self._device) for part in (plan.ids_S, plan.windows_S4, plan.flips_S))
            factors = None if plan.jitter_S3 is None else upload(plan.jitter_S3, self._device)
            yield plan, self._crop(self._stored, *numbers, factors, self._image_size)

    def close(self) -> None:
        """Frees the images."""
        self._stored = None


def _device_kernel(device: torch.device) -> Callable[..., torch.Tensor]:
    if device.type != "cuda":
        return crop_reference
    try:
        from pipelines.augment.crop_triton import crop_fused
    except ImportError:  # torch's own builds for CUDA bring Triton; others may not
        return crop_reference
    return crop_fused


class StagedCrops:
    """Crops made on the host while a step runs, uploaded from pinned memory on a stream of their own."""

    def __init__(self, request: PixelRequest, pixels_P: ByteArray, sizes: KeptSizes) -> None:
        """Keeps the buffer, uint8 [bytes]; pins a batch for each one that may be in the making, on its way, or being taken."""
        size, self._lead = request.config.image_size, request.config.prefetch_batches
        self._device, self._threads = request.device, CropThreads(request, pixels_P, sizes)
        self._stream = torch.cuda.Stream(request.device)
        shape = (request.max_samples, size, size, 3)
        slots = [(torch.empty(shape, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(self._lead + 2)]
        self._slots: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque(slots)

    def stream(self, plans: Iterator[BatchPlan]) -> PlannedPixels:
        """Keeps `prefetch_batches` batches in the making."""
        coming: deque[tuple[BatchPlan, torch.Tensor, torch.cuda.Event, list[Future[None]]]] = deque()
        try:
            for plan in plans:
                staged, uploaded = self._slots[0]
                self._slots.rotate(-1)
                uploaded.synchronize()  # of this slot's last batch; returns at once where there was none
                part = staged[: len(plan.ids_S)]
                coming.append((plan, part, uploaded, self._threads.begin(plan, part.numpy())))
                if len(coming) > self._lead:
                    yield self._uploaded(*coming.popleft())
            while coming:
                yield self._uploaded(*coming.popleft())
        finally:
            # Threads still write into the slots of an abandoned stream.
            for *_, work in coming:
                wait_for(work)

    def _uploaded(
        self, plan: BatchPlan, staged_SHWC: torch.Tensor, uploaded: torch.cuda.Event, work: list[Future[None]]
    ) -> tuple[BatchPlan, torch.Tensor]:
        wait_for(work)
        with torch.cuda.stream(self._stream):
            crops_SHWC = staged_SHWC.to(self._device, non_blocking=True)
            uploaded.record(self._stream)
        current: Any = torch.cuda.current_stream(self._device)
        current.wait_event(uploaded)
        crops_SHWC.record_stream(current)  # its memory belongs to the copying stream, which must not reuse it under the step
        return plan, crops_SHWC

    def close(self) -> None:
        """Ends threads and frees pinned memory."""
        self._threads.close()
        self._slots.clear()
