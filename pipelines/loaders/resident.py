"""Loader `resident`: every image decoded once and kept as uint8; a batch is a gather, a crop, a flip and a jitter in one pass.

Images are kept whole, one after another in one buffer, the larger ones shrunk to a shorter side that crops can do with. The buffer lies in
the CUDA device's memory where it fits there, else in the host's; on disk it is kept for the next run.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator

import numpy as np
import torch

from pipelines.format.reader import ByteArray
from pipelines.loaders.damage import damaged_samples
from pipelines.loaders.plan import BatchPlan
from pipelines.loaders.planned import PixelRequest
from pipelines.loaders.resident_cache import CacheDraft, CacheFile, begin_draft, cache_file, exclusive, open_cached
from pipelines.loaders.resident_crops import Crops, DeviceCrops, HostCrops, StagedCrops
from pipelines.loaders.resident_size import GIB, fits_device, free_host_bytes, kept_side, kept_sizes, largest_on_device, require_host_room
from pipelines.types import IntArray

_LOG = logging.getLogger(__name__)
# Sets that take seconds pass in silence.
_TELLING_BYTES = 1 << 30
_PIECE_BYTES = 64 << 20


class ResidentPixels:
    """Pixel source over one ragged uint8 buffer."""

    order = None
    jitters = True

    def __init__(self, request: PixelRequest) -> None:
        """Finds the decoded split on disk or decodes it.

        Raises:
            BackendError: it does not fit in memory; the sentence says what would. Or DALI is missing.
            DamagedSampleError: an image does not decode, and it is to be evaluated or `on_error` is "stop".
        """
        self._request, split = request, request.split
        self._side = kept_side(request.config)
        self._sizes = kept_sizes(split.heights_N, split.widths_N, self._side)
        self.stored_sizes = (self._sizes.heights_N, self._sizes.widths_N)
        self._damaged: IntArray = np.empty(0, np.int64)
        cache = cache_file(request, self._side, self._sizes.num_bytes)
        device_P = self._device_buffer()
        host_P = self._found_or_decoded(cache, device_P)
        self._crops = self._crops_of(host_P, device_P)

    def _device_buffer(self) -> torch.Tensor | None:
        """Room for all images in the CUDA device's memory, uint8 [bytes]; None where there is no such device, or not the room."""
        device, needed = self._request.device, self._sizes.num_bytes
        if device.type != "cuda":
            return None
        if fits_device(needed, device):
            with contextlib.suppress(torch.OutOfMemoryError):
                return torch.empty(needed, dtype=torch.uint8, device=device)
        _LOG.warning(
            "'%s' decoded takes %.1f GiB, too much for %s beside a network (%s would fit): crops are made on the host and uploaded",
            self._request.split.name,
            needed / GIB,
            device,
            f"--set data.resident.min_side={largest_on_device(self._request.split, device, self._side)}",
        )
        return None

    def _found_or_decoded(self, cache: CacheFile | None, device_P: torch.Tensor | None) -> ByteArray | None:
        """The images on the host, uint8 [bytes]; None where they were decoded straight into `device_P`."""
        found = None if cache is None else open_cached(cache)
        if found is not None:
            return found
        if device_P is None:
            require_host_room(self._request.split, self._request.config, free_host_bytes())
        if cache is None:
            return self._decode(None, device_P)
        with exclusive(cache.path.parent):
            found = open_cached(cache)  # another process may have finished it meanwhile
            return self._decode(begin_draft(cache), device_P) if found is None else found

    def _decode(self, draft: CacheDraft | None, device_P: torch.Tensor | None) -> ByteArray | None:
        from pipelines.loaders.resident_fill import decode_split  # imported here, for images found on disk need no decoder

        request, num_bytes = self._request, self._sizes.num_bytes
        skip = request.training and request.config.on_error == "skip"
        host_P = None
        if device_P is None:
            host_P = np.empty(num_bytes, np.uint8) if draft is None else draft.pixels_P
        target_P = torch.from_numpy(host_P) if device_P is None else device_P
        written = 0

        def put(start: int, pixels_P: torch.Tensor) -> None:
            nonlocal written
            target_P[start : start + len(pixels_P)].copy_(pixels_P)
            if draft is not None and device_P is None and start - written >= _PIECE_BYTES:
                draft.begin_writeback(written, start)
                written = start

        started_s = time.perf_counter()
        place = str(device_P.device) if device_P is not None else "memory"
        place += "" if draft is None else f" and {draft.path.parent}"
        self._tell("decoding %d images of '%s' once: %.1f GiB at shorter side %d, kept in %s", num_bytes / GIB, self._side, place)
        try:
            self._damaged = decode_split(request, self._sizes, put, skip)
            self._tell("decoded %d images of '%s' in %.0f s", time.perf_counter() - started_s)
            if draft is not None and not len(self._damaged):  # a set with holes is this run's only
                if device_P is not None:
                    _download(device_P, draft.pixels_P)
                draft.publish()
        finally:
            if draft is not None:
                draft.discard()
        return host_P

    def _tell(self, sentence: str, *details: float | str) -> None:
        if self._sizes.num_bytes >= _TELLING_BYTES:
            _LOG.info(sentence, len(self._request.split), self._request.split.name, *details)

    def _crops_of(self, host_P: ByteArray | None, device_P: torch.Tensor | None) -> Crops:
        if device_P is not None:
            if host_P is not None:
                _upload(host_P, device_P)
            return DeviceCrops(self._request, device_P, self._sizes)
        assert host_P is not None
        host_P.flags.writeable = False
        return (StagedCrops if self._request.device.type == "cuda" else HostCrops)(self._request, host_P, self._sizes)

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Yields each plan with its crops.

        Raises:
            DamagedSampleError: a plan names images that did not decode.
        """
        return self._crops.stream(self._whole(plans) if len(self._damaged) else plans)

    def _whole(self, plans: Iterator[BatchPlan]) -> Iterator[BatchPlan]:
        for plan in plans:
            if np.isin(plan.ids_S, self._damaged).any():
                raise damaged_samples(self._request.split, self._damaged)
            yield plan

    def close(self) -> None:
        """Ends threads and frees the images."""
        self._crops.close()


def _upload(host_P: ByteArray, device_P: torch.Tensor) -> None:
    """Copies a mapped buffer to the device, through two pinned pieces so that reading and copying overlap."""
    pieces = [(torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
    for number, start in enumerate(range(0, len(host_P), _PIECE_BYTES)):
        pinned, copied = pieces[number % 2]
        copied.synchronize()
        part = host_P[start : start + _PIECE_BYTES]
        pinned.numpy()[: len(part)] = part
        device_P[start : start + len(part)].copy_(pinned[: len(part)], non_blocking=True)
        copied.record(torch.cuda.current_stream(device_P.device))
    torch.cuda.current_stream(device_P.device).synchronize()


def _download(device_P: torch.Tensor, host_P: ByteArray) -> None:
    for start in range(0, len(host_P), _PIECE_BYTES):
        host_P[start : start + _PIECE_BYTES] = device_P[start : start + _PIECE_BYTES].cpu().numpy()
