"""Loose image files through the loaders' own pixels: batches as evaluation would see them, had the files been in shards.

Files come in chunks (`loose_files`). Each is a split in memory, over which `PlannedLoader` plans and finishes batches as over any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipelines.config import DataConfig
from pipelines.format import PixelOptions, ShardSet, ShardSplit
from pipelines.format.origin import LocalOrigin
from pipelines.loaders.dali_decoder import DaliDecoder
from pipelines.loaders.loose_files import LooseFile, read_chunks
from pipelines.loaders.plan import BatchPlan
from pipelines.loaders.planned import PixelRequest, PixelSource, PlannedLoader
from pipelines.loaders.resident import ResidentPixels
from pipelines.types import DamagedSampleError, IntArray

LooseBatch = tuple[list[str], torch.Tensor]


class LooseSplit(ShardSplit):
    """Files in memory, each a shard of its own; others take their place once they are done."""

    def __init__(self, files: Sequence[LooseFile]) -> None:
        """Holds the first files."""
        self.name, self.entry = "files", {}
        self.become(files)

    def become(self, files: Sequence[LooseFile]) -> None:
        """Holds `files` from now on; their ids count from 0."""
        images = [np.frombuffer(file.sample.sample.encoded, np.uint8) for file in files]
        self.paths = [Path(file.path) for file in files]
        self.labels_N = np.zeros(len(files), np.int64)
        self.heights_N = np.array([file.sample.height for file in files], np.int64)
        self.widths_N = np.array([file.sample.width for file in files], np.int64)
        self.shards_N, self.offsets_N = np.arange(len(files), dtype=np.uint32), np.zeros(len(files), np.uint64)
        self.sizes_N = np.array([len(image) for image in images], np.uint32)
        self.shard_bytes = self.sizes_N.astype(np.int64)
        self._tars = dict(enumerate(images))
        self._addresses = np.array([image.ctypes.data for image in images], np.int64)

    def shrunken(self, ids: IntArray) -> IntArray:
        """None: what is in memory stays as it was read."""
        return ids[:0]

    def describe(self, sample_id: int) -> str:
        """The path of a file, for messages."""
        return str(self.paths[sample_id])


class _DecodedCrops:
    """Pixel source `dali` over files that were checked when they were read; its pipeline outlives a chunk."""

    stored_sizes = None
    order = None

    def __init__(self, request: PixelRequest) -> None:
        self._split, self._decoder = request.split, DaliDecoder(request)

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        return self._decoder.stream((plan, self._split.encoded(plan.ids_S)) for plan in plans)

    def close(self) -> None:
        """Nothing: the next chunk goes through the same pipeline."""

    def finish(self) -> None:
        self._decoder.close()


class LooseLoader:
    """Serves files in batches, centre-cropped and in order, with the pixels that evaluation would see.

    Where the run keeps decoded images (loader `resident`) those pixels are shrunk before they are cropped, so they are here; every other
    loader decodes the crop's region, and so does this one. (Of `ffcv`, which resizes in a way of its own, it is the closest.)

    Attributes:
        num_damaged: files that were no readable images so far.
    """

    def __init__(self, config: DataConfig, device: torch.device, *, validate: bool = True) -> None:
        """Reads nothing yet.

        Args:
            config: of the run; loader, image size, batch size, threads and `eval_crop` are used.
            device: where batches are delivered.
            validate: look at every byte of plain JPEGs first. DALI fills what is damaged in one with grey, and says nothing.
        """
        resident = replace(config.resident, cache="off")  # what was predicted is not kept for a next time
        self._config = replace(config, loader="resident" if config.loader == "resident" else "dali", resident=resident)
        self._device, self._options = device, PixelOptions(validate=validate)
        self._split: LooseSplit | None = None
        self._decoding: _DecodedCrops | None = None
        self.num_damaged = 0

    def batches(self, paths: Iterable[str], on_damage: Callable[[str], None]) -> Iterator[LooseBatch]:
        """Yields paths (B) and images, uint8 [B, image_size, image_size, 3] on the device, in the order of `paths`.

        Args:
            paths: of image files; taken as they are needed, by another thread.
            on_damage: told one sentence about each file that is no readable image, which is then left out.

        Raises:
            BackendError: DALI is missing, or failed for another reason than an image.
        """
        threads = self._config.num_threads or len(os.sched_getaffinity(0))
        with closing(read_chunks(paths, self._options, self._config.batch_size, threads)) as chunks:
            for files, complaints in chunks:
                for complaint in complaints:
                    self._damaged(complaint, on_damage)
                while files:
                    files = yield from self._decoded(files, on_damage)

    def _damaged(self, complaint: str, on_damage: Callable[[str], None]) -> None:
        self.num_damaged += 1
        on_damage(complaint)

    def _decoded(self, files: list[LooseFile], on_damage: Callable[[str], None]) -> Generator[LooseBatch, None, list[LooseFile]]:
        """The batches of one chunk; returns what is to be decoded anew, because a file among them made the decoder fail."""
        served = 0
        try:
            with closing(self._loader(files)) as loader:
                for batch in loader.epoch(0):
                    served += len(batch.ids_S)
                    yield [files[i].path for i in batch.ids_S.tolist()], batch.images_SHWC
            return []
        except DamagedSampleError as error:
            damaged = set(error.ids.tolist())
            for i in sorted(damaged):
                self._damaged(f"{files[i].sample.sample.source} is not a readable image: DALI does not decode it", on_damage)
            return [file for i, file in enumerate(files) if i >= served and i not in damaged]

    def _loader(self, files: list[LooseFile]) -> PlannedLoader:
        if self._split is None:
            self._split = LooseSplit(files)
        else:
            self._split.become(files)
        request = PixelRequest(
            shards=ShardSet(Path(), {}, "", LocalOrigin(Path())),  # files have none; neither source asks
            split=self._split,
            config=self._config,
            training=False,
            device=self._device,
            rank=0,
            world_size=1,
            seed=0,
        )
        return PlannedLoader(request, self._source(request), num_classes=1)

    def _source(self, request: PixelRequest) -> PixelSource:
        if self._config.loader == "resident":
            return ResidentPixels(request)
        if self._decoding is None:
            self._decoding = _DecodedCrops(request)
        return self._decoding

    def close(self) -> None:
        """Frees DALI's threads and buffers."""
        if self._decoding is not None:
            self._decoding.finish()
            self._decoding = None
