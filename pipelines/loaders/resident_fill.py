"""Decodes every image of a split once through DALI, brought to the size in which it is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pipelines.format.touch import read_ahead
from pipelines.loaders.dali_decoder import explain_dali
from pipelines.loaders.dali_package import ReleaseUnusedMemory, fn, types
from pipelines.loaders.dali_pipeline import Feed, ScheduledPipeline, new_pipeline
from pipelines.loaders.damage import SampleGuard, damaged_samples, tiny_jpeg
from pipelines.loaders.decoder_options import decoder_options
from pipelines.loaders.planned import PixelRequest
from pipelines.loaders.resident_size import KeptSizes
from pipelines.types import DamagedSampleError, IntArray, UserError

# Decoded bytes of one DALI batch, about: large enough to fill the threads, small beside the set.
_BATCH_BYTES = 64 << 20
Put = Callable[[int, torch.Tensor], None]


def decode_split(request: PixelRequest, sizes: KeptSizes, put: Put, skip_damaged: bool) -> IntArray:
    """Decodes all images, in the order of their ids.

    Args:
        request: what to read, on which device to decode.
        sizes: the size in which each is wanted.
        put: called with an offset in bytes and the pixels that belong there, uint8 [bytes] on the decoding device, valid during the call.
        skip_damaged: leave images out that do not decode.

    Returns:
        int64: ids of the images left out.

    Raises:
        DamagedSampleError: an image does not decode, or to another size than the index says, unless they are skipped.
    """
    return _SplitDecoder(request, sizes, put).run(skip_damaged)


class _SplitDecoder:
    def __init__(self, request: PixelRequest, sizes: KeptSizes, put: Put) -> None:
        split = request.split
        self._request, self._split, self._sizes, self._put = request, split, sizes, put
        self._guard = SampleGuard(split)
        self._shrinks = bool(((sizes.heights_N != split.heights_N) | (sizes.widths_N != split.widths_N)).any())
        mean_bytes = 3 * int((split.heights_N * split.widths_N).mean())
        self._batch_size = min(len(split), max(16, min(1024, _BATCH_BYTES // mean_bytes)))
        self._done_N = np.zeros(len(split), np.bool_)
        self._scheduled: deque[IntArray] = deque()
        self._misshapen: list[int] = []

    def run(self, skip_damaged: bool) -> IntArray:
        depth = self._request.config.prefetch_batches
        tiny: Feed = {"encoded": [tiny_jpeg()]} | ({"size": np.full((1, 2), 32, np.float32)} if self._shrinks else {})
        pipeline: ScheduledPipeline[IntArray, None] = ScheduledPipeline(
            self._define, depth=depth, device=self._request.device, tiny=tiny, take=self._take, explain=self._explain
        )
        damaged_N = np.zeros(len(self._split), np.bool_)
        try:
            while not (self._done_N | damaged_N).all():
                self._scheduled.clear()
                try:
                    for _ in pipeline.run(self._feeds(np.flatnonzero(~(self._done_N | damaged_N)))):
                        pass
                    if self._misshapen:
                        raise damaged_samples(self._split, np.array(self._misshapen))
                except DamagedSampleError as error:
                    if not skip_damaged:
                        raise
                    damaged_N[error.ids] = True
                    self._misshapen = []
        finally:
            pipeline.close()
            ReleaseUnusedMemory()  # DALI keeps what it freed, and the network wants it
        found: IntArray = np.flatnonzero(damaged_N)
        return found

    def _define(self) -> Any:
        request = self._request
        pipeline = new_pipeline(self._batch_size, request.device, request.num_threads, request.config.prefetch_batches)
        with pipeline:
            encoded = fn.external_source(name="encoded", device="cpu", no_copy=True, dtype=types.UINT8, ndim=1)
            shapes = fn.peek_image_shape(encoded)
            images = fn.decoders.image(encoded, **decoder_options(request))
            if self._shrinks:
                size = fn.external_source(name="size", device="cpu", dtype=types.FLOAT, ndim=1)
                images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
            pipeline.set_outputs(images, shapes)
        pipeline.build()
        return pipeline

    def _feeds(self, ids: IntArray) -> Iterator[tuple[IntArray, Feed]]:
        split, sizes = self._split, self._sizes
        batches = [ids[start : start + self._batch_size] for start in range(0, len(ids), self._batch_size)]
        for number, batch in enumerate(batches):
            for ahead in batches[number + 1 : number + 2]:
                read_ahead(split.addresses(ahead), split.sizes_N[ahead])
            self._guard.require_whole(batch)
            feed: Feed = {"encoded": split.encoded(batch)}
            if self._shrinks:
                feed["size"] = np.stack([sizes.heights_N[batch], sizes.widths_N[batch]], axis=1).astype(np.float32)
            self._scheduled.append(batch)
            yield batch, feed

    def _take(self, outputs: tuple[Any, ...]) -> None:
        """Hands the pixels on while DALI still holds them; the tiny batches of a new pipeline do not come here."""
        images, shapes = outputs
        ids, sizes, split = self._scheduled.popleft(), self._sizes, self._split
        # What DALI shrinks always comes in the wanted size, so it is the size in the image's own header that tells.
        expected = np.stack([split.heights_N[ids], split.widths_N[ids]], axis=1)
        as_expected = (np.asarray(shapes.as_tensor())[:, :2] == expected).all(axis=1)
        if not as_expected.all():
            self._misshapen += ids[~as_expected].tolist()
            ids, places = ids[as_expected], np.flatnonzero(as_expected).tolist()
        else:
            places = list(range(len(ids)))
        if len(places) == len(images) and images.is_dense_tensor() and ids[-1] - ids[0] == len(ids) - 1:
            self._put(int(sizes.offsets_N[ids[0]]), torch.from_dlpack(images.as_tensor()).view(-1))
        else:
            for place, sample_id in zip(places, ids.tolist(), strict=True):
                self._put(int(sizes.offsets_N[sample_id]), torch.from_dlpack(images[place]).view(-1))
        self._done_N[ids] = True

    def _explain(self, error: RuntimeError, in_flight: list[IntArray]) -> UserError:
        return explain_dali(error, self._request, np.concatenate(in_flight))
