"""Loader `resident`: every image decoded once and kept as uint8 on the device; a batch is a gather, a crop and a flip.

Sets whose images all have one size are kept as they are. Others are brought to the centred square that evaluation sees, scaled so that
evaluation's crop is image_size: crops are then drawn inside that square (the ragged buffer of whole images is not built yet).
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

import numpy as np
import torch
from PIL import Image

from pipelines.augment.geometry import crop_resident
from pipelines.augment.pixel_ops import upload
from pipelines.loaders.plan import BatchPlan
from pipelines.loaders.planned import PixelRequest
from pipelines.types import BackendError, ShardError


class ResidentPixels:
    """Pixel source over one uint8 tensor [N, size, size, 3] on the device."""

    order = None

    def __init__(self, request: PixelRequest) -> None:
        """Decodes the whole split with a few threads; memory is N·size²·3 bytes."""
        self._request = request
        split, config = request.split, request.config
        sizes = np.unique(np.concatenate([split.heights_N, split.widths_N]))
        stored_size = int(sizes[0]) if len(sizes) == 1 else round(config.image_size / config.augment.eval_crop)
        self._resize, self._side = len(sizes) != 1, stored_size
        self.stored_sizes = (np.full(len(split), stored_size, np.int64),) * 2
        images_NHWC = self._empty((len(split), stored_size, stored_size, 3))
        with ThreadPoolExecutor(config.num_threads or cpu_count() or 1) as pool:
            for start in range(0, len(split), 1024):
                ids = np.arange(start, min(start + 1024, len(split)))
                for sample_id, pixels in zip(ids, pool.map(self._decode, ids, split.encoded(ids)), strict=True):
                    images_NHWC[sample_id] = pixels
        try:
            self._images_NHWC = torch.from_numpy(images_NHWC).to(request.device)
        except torch.OutOfMemoryError:
            raise self._too_large(images_NHWC.nbytes, str(request.device)) from None

    def _empty(self, shape: tuple[int, ...]) -> np.ndarray:
        try:
            return np.empty(shape, np.uint8)
        except MemoryError:
            raise self._too_large(int(np.prod(shape)), "the host") from None

    @staticmethod
    def _too_large(num_bytes: int, place: str) -> BackendError:
        return BackendError(
            f"loader 'resident' needs {num_bytes / (1 << 30):.1f} GiB on {place}, which has not that much free; take --loader dali"
        )

    def _decode(self, sample_id: int, encoded: np.ndarray) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(encoded.data)) as image:
                upright = image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ShardError(f"{self._request.split.describe(sample_id)} does not decode ({error}); make the shards again") from error
        if self._resize:
            side = min(upright.size)
            left, top = (upright.width - side) // 2, (upright.height - side) // 2
            upright = upright.resize(
                (self._side, self._side), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side), reducing_gap=None
            )
        return np.asarray(upright)

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Gathers, crops and flips on the device; nothing runs ahead because nothing is waited for."""
        image_size, device = self._request.config.image_size, self._request.device
        for plan in plans:
            images_SHWC = self._images_NHWC[upload(plan.ids_S, device)]
            # Windows of the target's own size are copied exactly; all others are resampled.
            resize = bool((plan.windows_S4[:, 2:] != image_size).any())
            yield plan, crop_resident(images_SHWC, upload(plan.windows_S4, device), upload(plan.flips_S, device), image_size, resize)

    def close(self) -> None:
        """Frees the images."""
        self._images_NHWC = torch.empty(0, dtype=torch.uint8)
