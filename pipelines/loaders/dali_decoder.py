"""From encoded images to crops through DALI: the operators, and a decoder that takes the images of a plan from memory.

Both streams of a step are one DALI batch. Crops and flips come with the plan, so DALI draws no random numbers, and CPU and GPU agree.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch

from pipelines.format.reader import ByteArray
from pipelines.loaders.dali_package import fn, types
from pipelines.loaders.dali_pipeline import Feed, ScheduledPipeline, new_pipeline
from pipelines.loaders.damage import explain_failure, tiny_jpeg
from pipelines.loaders.decoder_options import decoder_options
from pipelines.loaders.plan import BatchPlan
from pipelines.loaders.planned import PixelRequest
from pipelines.types import IntArray, UserError


def _define(request: PixelRequest) -> Any:
    """The graph: encoded bytes + window + flip → uint8 [S, image_size, image_size, 3]."""
    config = request.config
    pipeline = new_pipeline(request.max_samples, request.device, request.num_threads, config.prefetch_batches)
    with pipeline:
        encoded = fn.external_source(name="encoded", device="cpu", no_copy=True, dtype=types.UINT8, ndim=1)
        window = fn.external_source(name="window", device="cpu", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", device="cpu", dtype=types.INT32, ndim=0)
        pipeline.set_outputs(crop_encoded(request, encoded, window, flip))
    pipeline.build()
    return pipeline


def crop_encoded(request: PixelRequest, encoded: Any, window: Any, flip: Any) -> Any:
    """The DALI operators from encoded bytes, a window (int32 [4]) and a flip (int32) of each sample to its crop; inside a pipeline."""
    config = request.config
    corner, extent = window[0:2], window[2:4]
    options = decoder_options(request)
    if request.training and config.augment.crop == "pad":
        # A padded crop reaches beyond the image, which the region decoder refuses; such images are small anyway.
        images = fn.decoders.image(encoded, **options)
        images = fn.slice(images, corner, extent, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
    else:
        images = fn.decoders.image_slice(encoded, corner, extent, axes=[0, 1], **options)
        images = fn.resize(images, size=[config.image_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.flip(images, horizontal=flip)


class DaliDecoder:
    """Turns plans and the encoded images they name into crops; what `dali` and `webdataset` share."""

    def __init__(self, request: PixelRequest) -> None:
        """Builds the pipeline and runs it once on a tiny image."""
        window, flip = np.array([[0, 0, 64, 64]], np.int32), np.zeros(1, np.int32)
        self._request = request
        self._pipeline: ScheduledPipeline[BatchPlan, torch.Tensor] = ScheduledPipeline(
            lambda: _define(request),
            depth=request.config.prefetch_batches,
            device=request.device,
            tiny={"encoded": [tiny_jpeg()], "window": window, "flip": flip},
            take=take_tensor,
            explain=self._explain,
        )

    def stream(self, items: Iterator[tuple[BatchPlan, list[ByteArray]]]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Yields each plan with its crops, uint8 [S, image_size, image_size, 3], from the encoded images of its S samples.

        Raises:
            DamagedSampleError: samples do not decode.
            BackendError: DALI failed for another reason.
        """
        return self._pipeline.run((plan, _feed_of(plan, encoded)) for plan, encoded in items)

    def _explain(self, error: RuntimeError, in_flight: list[BatchPlan]) -> UserError:
        return explain_dali(error, self._request, np.unique(np.concatenate([plan.ids_S for plan in in_flight])))

    def close(self) -> None:
        """Frees DALI's threads and buffers."""
        self._pipeline.close()


def explain_dali(error: RuntimeError, request: PixelRequest, ids: IntArray) -> UserError:
    """`explain_failure`, which asks DALI about each of int64 `ids` alone where Pillow decodes them all."""

    def decodes(encoded: ByteArray) -> bool:
        pipeline = new_pipeline(1, request.device, 1, 1)
        with pipeline:
            images = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(fn.decoders.image(images, **decoder_options(request)))
        try:
            pipeline.feed_input("encoded", [encoded])
            pipeline.run()
        except RuntimeError:
            return False
        return True

    return explain_failure(error, request.split, ids, decodes)


def take_tensor(outputs: tuple[Any, ...]) -> torch.Tensor:
    """The one output of an iteration as a tensor.

    The dynamic executor hands the buffer over, ordered on the current stream: it lives as long as the tensor, nothing is copied.
    """
    (images,) = outputs
    return torch.from_dlpack(images.as_tensor())


def _feed_of(plan: BatchPlan, encoded: list[ByteArray]) -> Feed:
    return {"encoded": encoded, "window": plan.windows_S4, "flip": plan.flips_S}
