"""The one loader: plans batches, lets a pixel source fill them, finishes them on the device.

order ─→ BatchPlan (host) ─→ PixelSource.stream: decode, crop, flip ─→ jitter, policy, cutout (device) ─→ Batch
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pipelines.augment.cutout import cutout
from pipelines.augment.jitter import jitter
from pipelines.augment.pixel_ops import upload
from pipelines.augment.policies import apply_policy
from pipelines.config import DataConfig
from pipelines.format import ShardSet, ShardSplit
from pipelines.loaders.plan import BatchPlan, SplitGeometry, StepOrder, eval_plans, train_plans
from pipelines.order import SampleOrder
from pipelines.types import Batch, DamagedSampleError, IntArray

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PixelRequest:
    """What a pixel source is asked to serve: `split` of `shards` (`split.name` is its name), on `device`, for `rank` of `world_size`."""

    shards: ShardSet
    split: ShardSplit
    config: DataConfig
    training: bool
    device: torch.device
    rank: int
    world_size: int
    seed: int

    @property
    def max_samples(self) -> int:
        """S of the largest batch of this rank."""
        per_rank = -(-min(self.config.batch_size, len(self.split)) // self.world_size)
        return (2 if self.training else 1) * per_rank

    @property
    def num_threads(self) -> int:
        """Decoding threads: as configured, else one for each core this process may use."""
        return self.config.num_threads or len(os.sched_getaffinity(0))


class PixelSource(Protocol):
    """Turns plans into pixels, in order."""

    @property
    def stored_sizes(self) -> tuple[IntArray, IntArray] | None:
        """Heights and widths, int64 [N], of the images as the source keeps them, whose pixels windows are in; None: as in the index."""
        ...

    @property
    def order(self) -> StepOrder | None:
        """The order the source can serve in training, where it cannot serve every order; None: the exact one."""
        ...

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Yields each plan with its images, uint8 [S, image_size, image_size, 3] on the device, cropped and flipped.

        Raises:
            DamagedSampleError: samples do not decode; the source can be streamed from again, with plans that avoid them.
        """
        ...

    def close(self) -> None:
        """Frees threads and buffers."""
        ...


def split_geometry(split: ShardSplit, image_size: int, stored_sizes: tuple[IntArray, IntArray] | None = None) -> SplitGeometry:
    """The geometry of a split, whose images a source keeps in `stored_sizes` (heights, widths) or as they are."""
    sizes_N2 = np.stack([split.heights_N, split.widths_N], axis=1)
    kept_N2 = sizes_N2 if stored_sizes is None else np.stack(stored_sizes, axis=1)
    return SplitGeometry(sizes_N2=sizes_N2, kept_N2=kept_N2, image_size=image_size)


def stand_ins(labels_N: IntArray, damaged_N: np.ndarray, usable_N: np.ndarray) -> IntArray:
    """int64 [N]: for each damaged sample (bool [N]) the next usable one (bool [N]) of its class, −1 where it has none; else itself."""
    stand_ins_N = np.arange(len(labels_N))
    for label in np.unique(labels_N[damaged_N]):
        hurt, usable = (np.flatnonzero((labels_N == label) & chosen_N) for chosen_N in (damaged_N, usable_N))
        stand_ins_N[hurt] = usable[np.searchsorted(usable, hurt) % len(usable)] if len(usable) else -1
    return stand_ins_N


class PlannedLoader:
    """Implements `pipelines.types.Loader` over any `PixelSource`.

    Attributes:
        num_steps: batches of an epoch on every rank.
    """

    def __init__(self, request: PixelRequest, source: PixelSource, num_classes: int) -> None:
        """Groups the samples by class once; everything else happens in `epoch`."""
        split, config = request.split, request.config
        self._request, self._source = request, source
        self._source_jitters: bool = getattr(source, "jitters", False)  # it applies the colour jitter itself, where that is cheaper
        self._stream = source.stream(iter(()))
        self._order = source.order or SampleOrder(split.labels_N, num_classes, config.batch_size, request.seed, config.order)
        self._geometry = split_geometry(split, config.image_size, source.stored_sizes)
        self._substitutes_N: IntArray | None = None
        self.num_steps = self._order.num_steps if request.training else -(-len(split) // config.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of `epoch` from `start_step` on; an epoch still open before is closed first.

        Raises:
            DamagedSampleError: samples do not decode, and `on_error` is "stop", or this is evaluation, or their class has no other.
        """
        next_step: int | None = start_step
        while next_step is not None:
            self._stream.close()
            self._stream = stream = self._source.stream(self._plans(epoch, next_step))
            try:
                for plan, images_SHWC in stream:
                    yield self._finish(plan, images_SHWC)
                    next_step = plan.step + 1
                next_step = None
            except DamagedSampleError as error:
                # What was delivered before stays; the batches from here on are planned anew, without the damaged samples.
                if self._request.config.on_error == "stop" or not self._request.training:
                    raise
                self._substitute(error)
            finally:
                stream.close()  # its own, at once: an epoch that is dropped holds no threads until the next one begins

    def step_ids(self, epoch: int, step: int) -> IntArray:
        """int64 [S]: what all ranks together are given at `step` of a training epoch, instance stream and then partner stream.

        Stand-ins of damaged samples are those that this rank has met.
        """
        augment = self._request.config.augment
        return next(train_plans(self._order, self._geometry, augment, epoch, step, 0, 1, self._substitutes_N)).ids_S

    def _plans(self, epoch: int, start_step: int) -> Iterator[BatchPlan]:
        request = self._request
        augment, rank, world_size = request.config.augment, request.rank, request.world_size
        if request.training:
            return train_plans(self._order, self._geometry, augment, epoch, start_step, rank, world_size, self._substitutes_N)
        return eval_plans(self._geometry, augment.eval_crop, request.config.batch_size, start_step, rank, world_size)

    def _substitute(self, error: DamagedSampleError) -> None:
        """Has the next sample of its class stand in for each damaged one, from now on: a function of the data, not of when it was found."""
        labels_N = self._request.split.labels_N
        damaged_N = np.zeros(len(labels_N), np.bool_) if self._substitutes_N is None else self._substitutes_N != np.arange(len(labels_N))
        if damaged_N[error.ids].all():
            raise error
        damaged_N[error.ids] = True
        substitutes_N = stand_ins(labels_N, damaged_N, ~damaged_N)
        if (substitutes_N < 0).any():
            raise error
        self._substitutes_N = substitutes_N
        _LOG.warning("%s; training goes on with another image of the class in its place", error)

    def _finish(self, plan: BatchPlan, images_SHWC: torch.Tensor) -> Batch:
        if plan.jitter_S3 is not None and not self._source_jitters:
            images_SHWC = jitter(images_SHWC, plan.jitter_S3)
        if plan.policy is not None:
            images_SHWC = apply_policy(images_SHWC, plan.policy)
        if plan.cutout_S2 is not None:
            images_SHWC = cutout(images_SHWC, upload(plan.cutout_S2, images_SHWC.device), self._request.config.augment.cutout)
        labels_S = upload(self._request.split.labels_N[plan.ids_S], images_SHWC.device)
        mix = None if plan.mix is None else upload(plan.mix, images_SHWC.device)
        return Batch(images_SHWC=images_SHWC, labels_S=labels_S, ids_S=plan.ids_S, mix=mix, epoch=plan.epoch, step=plan.step)

    def close(self) -> None:
        """Ends an open epoch and frees the pixel source; the loader cannot be used afterwards."""
        self._stream.close()
        self._source.close()
