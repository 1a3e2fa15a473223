"""Loader `dali` fed by index files: DALI's own webdataset reader follows a hand-made index in the order of the plans, without Python.

The reader takes pairs of a tar and an index file and reads what the index lists, in its order, repeats included; it checks neither order
nor uniqueness. An index cannot be exchanged once the pipeline is built, so an epoch is cut into segments of a pipeline each, and the
next one is built while the last is read. A pair may hold an open file, so a batch is read shard by shard and put into the plan's order
afterwards:

    plan's ids   7 2 9 4      shards of them   a b a b      read   a: 7 9, b: 2 4      delivered   7 2 9 4
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.augment.pixel_ops import upload
from pipelines.format.reader import ShardSplit
from pipelines.loaders.dali_decoder import crop_encoded, explain_dali, take_tensor
from pipelines.loaders.dali_package import fn, types
from pipelines.loaders.dali_pipeline import new_pipeline
from pipelines.loaders.damage import SampleGuard
from pipelines.loaders.plan import BatchPlan
from pipelines.loaders.planned import PixelRequest
from pipelines.types import BackendError, IntArray, ShardError

SEGMENT_SAMPLES = 1 << 16  # about a third of a second to parse
_OPEN_FILES_SHARE = 4  # pairs may take this part of the files a process may open; two pipelines live at once


@dataclass(frozen=True)
class _Segment:
    """Some steps of an epoch, the rows of each plan in reading order, and the pipeline that reads them."""

    plans: list[BatchPlan]
    places: list[IntArray]
    pipeline: Any


class IndexPixels:
    """Pixel source `dali` with `feed` "index"."""

    stored_sizes = None
    order = None

    def __init__(self, request: PixelRequest) -> None:
        """Pipelines are built when a stream begins."""
        self._request = request
        self._guard = SampleGuard(request.split)
        shards_a_batch = min(request.max_samples, len(request.split.paths))
        pairs = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _OPEN_FILES_SHARE
        steps = SEGMENT_SAMPLES // request.max_samples
        if len(request.split.paths) > 1:
            steps = min(steps, pairs // shards_a_batch)
        self._segment_steps = max(steps, 1)

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Reads segment after segment; the next one's pipeline is built by a thread meanwhile.

        Raises:
            DamagedSampleError: samples do not decode.
            ShardError: a shard was removed, for DALI opens them by their paths with every segment.
            BackendError: the temporary folder takes no index files, or DALI failed for another reason.
        """
        with _index_folder() as folder, ThreadPoolExecutor(1) as builder:
            coming = self._next(builder, Path(folder) / "0", plans)
            number = 0
            while coming is not None:
                segment = coming.result()
                number += 1
                coming = self._next(builder, Path(folder) / str(number), plans)
                yield from self._read(segment)

    def _next(self, builder: ThreadPoolExecutor, folder: Path, plans: Iterator[BatchPlan]) -> Future[_Segment] | None:
        segment = list(islice(plans, self._segment_steps))
        return builder.submit(self._open, folder, segment) if segment else None

    def _open(self, folder: Path, plans: list[BatchPlan]) -> _Segment:
        """Writes the index files and starts a pipeline over them."""
        request, split = self._request, self._request.split
        places = [np.argsort(split.shards_N[plan.ids_S], kind="stable") for plan in plans]
        ids = [_filled(plan.ids_S[place], request.max_samples) for plan, place in zip(plans, places, strict=True)]
        try:
            folder.mkdir()
            paths, index_paths = write_indexes(split, np.concatenate(ids), folder)
        except OSError as error:
            raise _cannot_write(error) from error
        config = request.config
        pipeline = new_pipeline(request.max_samples, request.device, request.num_threads, config.prefetch_batches)
        with pipeline:
            encoded = fn.readers.webdataset(paths=paths, index_paths=index_paths, ext=["jpg"], missing_component_behavior="error")
            window = fn.external_source(name="window", device="cpu", dtype=types.INT32, ndim=1)
            flip = fn.external_source(name="flip", device="cpu", dtype=types.INT32, ndim=0)
            pipeline.set_outputs(crop_encoded(request, encoded, window, flip))
        with self._explained([]):
            pipeline.build()
        return _Segment(plans, places, pipeline)

    def _read(self, segment: _Segment) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """DALI's first `schedule_run` starts as many iterations as are prefetched, so that many are fed before it; then one for one."""
        pipeline, depth = segment.pipeline, self._request.config.prefetch_batches
        steps = list(zip(segment.plans, segment.places, strict=True))
        fed = 0
        for plan, place in (steps * depth)[:depth]:  # repeated where the segment is shorter
            self._feed(pipeline, plan, place)
            fed += 1
        with self._explained(segment.plans[:fed]):
            pipeline.schedule_run()
        for number, (plan, place) in enumerate(steps):
            images = self._collect(pipeline, segment.plans[number:fed])
            if fed < len(steps):
                self._feed(pipeline, *steps[fed])
                fed += 1
                with self._explained(segment.plans[number + 1 : fed]):
                    pipeline.schedule_run()
            yield plan, self._in_order(images, place)

    def _feed(self, pipeline: Any, plan: BatchPlan, place: IntArray) -> None:
        self._guard.require_whole(plan.ids_S)
        size = self._request.max_samples
        pipeline.feed_input("window", _filled(plan.windows_S4[place], size))
        pipeline.feed_input("flip", _filled(plan.flips_S[place], size))

    def _collect(self, pipeline: Any, in_flight: list[BatchPlan]) -> torch.Tensor:
        device = self._request.device
        with self._explained(in_flight):
            outputs = pipeline.share_outputs(torch.cuda.current_stream(device) if device.type == "cuda" else None)
        images = take_tensor(outputs)
        pipeline.release_outputs()
        return images

    @contextmanager
    def _explained(self, in_flight: list[BatchPlan]) -> Iterator[None]:
        """Makes DALI's error the user's; it says neither which file nor which sample it is about."""
        try:
            yield
        except RuntimeError as error:
            raise self._removed() or explain_dali(error, self._request, _ids_of(in_flight)) from error

    def _removed(self) -> ShardError | None:
        for path in self._request.split.paths:
            try:
                path.stat()  # opens nothing: files a process may open can be what is missing
            except OSError as error:
                return ShardError(
                    f"shard {path} was removed while it was read ({error.strerror}); copy it there again and continue with --resume"
                )
        return None

    def _in_order(self, images: torch.Tensor, place: IntArray) -> torch.Tensor:
        images = images[: len(place)]
        if len(self._request.split.paths) == 1:
            return images  # one shard: the stable sort changed nothing
        return images.index_select(0, upload(np.argsort(place), images.device))

    def close(self) -> None:
        """Nothing outlives a stream."""


@contextmanager
def _index_folder() -> Iterator[str]:
    try:
        # Cleaning up needs open files itself: where none can be had, that must not hide the reason.
        folder = tempfile.TemporaryDirectory(prefix="bce3s-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _cannot_write(error) from error
    with folder as path:
        yield path


def _cannot_write(error: OSError) -> BackendError:
    folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")
    return BackendError(
        f"cannot write index files for DALI to the temporary folder {folder} ({error.strerror or error}): "
        "free room there, set TMPDIR to another folder, or take --set data.dali.feed=memory, which writes none"
    )


def _ids_of(plans: list[BatchPlan]) -> IntArray:
    return np.unique(np.concatenate([np.empty(0, np.int64), *(plan.ids_S for plan in plans)]))


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """`rows` with the last one repeated to `size` of them: a reader's batches all have one size."""
    return rows if len(rows) == size else np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def write_indexes(split: ShardSplit, ids: IntArray, folder: Path) -> tuple[list[str], list[str]]:
    """Writes index files that make DALI's webdataset reader deliver the images of int64 `ids` in their order; returns tars and indexes."""
    shards = split.shards_N[ids]
    starts = np.flatnonzero(np.diff(shards.astype(np.int64), prepend=-1))
    paths, index_paths = [], []
    for number, run in enumerate(np.split(ids, starts[1:])):
        values = np.stack([split.offsets_N[run].astype(np.int64), split.sizes_N[run].astype(np.int64), run], axis=1)
        lines = "jpg %d %d %d\n" * len(run) % tuple(values.ravel().tolist())
        index_path = folder / f"{number}.idx"
        index_path.write_text(f"v1.2 {len(run)}\n{lines}")
        paths.append(str(split.paths[int(split.shards_N[run[0]])]))
        index_paths.append(str(index_path))
    return paths, index_paths
