"""The plan of a batch: ids, crops, flips, policy and mixing, drawn on the host before any pixel is read.

A plan is a pure function of (seed, epoch, step, rank), so every loader delivers the same samples with the same augmentation, and a
resumed run continues exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.augment.cutout import draw_cutout_centers
from pipelines.augment.geometry import FlipArray, WindowArray, center_windows, draw_windows, rescale_windows
from pipelines.augment.jitter import JitterArray, draw_jitter
from pipelines.augment.mix import MixArray, draw_mix
from pipelines.augment.policies import PolicyPlan, draw_policy
from pipelines.config import AugmentConfig
from pipelines.order import INSTANCE, PARTNER
from pipelines.randomness import Purpose, derive_key, position_keys
from pipelines.types import IntArray


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What one batch will hold; S = 2B in training (instance, then partner), B in evaluation.

    Args:
        epoch, step: place in the order.
        ids_S: int64 [S].
        windows_S4, flips_S: crop and flip of each sample.
        policy: drawn operations, None without a policy.
        cutout_S2: int32 [S, 2] centres, None without cutout.
        mix: λ and box, None in evaluation.
        jitter_S3: factors of brightness, contrast and saturation, None without colour jitter.
    """

    epoch: int
    step: int
    ids_S: IntArray
    windows_S4: WindowArray
    flips_S: FlipArray
    policy: PolicyPlan | None
    cutout_S2: np.ndarray | None
    mix: MixArray | None
    jitter_S3: JitterArray | None = None


@dataclass(frozen=True, kw_only=True)
class SplitGeometry:
    """Sizes the crops depend on.

    Args:
        sizes_N2: int64 [N, 2], (height, width) of the images in the shards, for which crops are drawn: the same for every loader.
        kept_N2: int64 [N, 2], of the images a loader has at hand, to which they are then brought.
        image_size: side of the result in pixels.
    """

    sizes_N2: IntArray
    kept_N2: IntArray
    image_size: int


class StepOrder(Protocol):
    """Who is drawn when; `SampleOrder` is the exact one."""

    seed: int

    @property
    def num_steps(self) -> int:
        """Steps of an epoch on every rank."""
        ...

    def instance_epoch(self, epoch: int) -> IntArray:
        """int64 [E]: ids of the instance stream."""
        ...

    def partner_epoch(self, epoch: int) -> IntArray:
        """int64 [E]: ids of the partner stream."""
        ...

    def step_positions(self, step: int, rank: int = 0, world_size: int = 1) -> IntArray:
        """int64 [B]: positions in both streams that `rank` reads at `step`."""
        ...


def train_plans(
    order: StepOrder,
    geometry: SplitGeometry,
    augment: AugmentConfig,
    epoch: int,
    start_step: int,
    rank: int,
    world_size: int,
    substitutes_N: IntArray | None = None,
) -> Iterator[BatchPlan]:
    """The plans of one training epoch from `start_step` on; sample i is drawn as sample `substitutes_N[i]`, int64 [N], where given."""
    streams = (order.instance_epoch(epoch), order.partner_epoch(epoch))
    jitters = any(augment.color_jitter)
    bases = {
        purpose: [derive_key(order.seed, epoch, stream, purpose) for stream in (INSTANCE, PARTNER)]
        for purpose in (Purpose.CROP, Purpose.POLICY, Purpose.CUTOUT, *((Purpose.JITTER,) if jitters else ()))
    }
    for step in range(start_step, order.num_steps):
        positions = order.step_positions(step, rank, world_size)
        ids_S = np.concatenate([stream[positions] for stream in streams])
        if substitutes_N is not None:
            ids_S = substitutes_N[ids_S]
        keys = {purpose: np.concatenate([position_keys(base, positions) for base in pair]) for purpose, pair in bases.items()}
        sizes_S2 = geometry.sizes_N2[ids_S]
        windows_S4, flips_S = draw_windows(keys[Purpose.CROP], sizes_S2[:, 0], sizes_S2[:, 1], geometry.image_size, augment)
        if geometry.kept_N2 is not geometry.sizes_N2:
            windows_S4 = rescale_windows(windows_S4, sizes_S2, geometry.kept_N2[ids_S])
        yield BatchPlan(
            epoch=epoch,
            step=step,
            ids_S=ids_S,
            windows_S4=windows_S4,
            flips_S=flips_S,
            policy=None if augment.policy == "none" else draw_policy(augment.policy, keys[Purpose.POLICY]),
            cutout_S2=draw_cutout_centers(keys[Purpose.CUTOUT], geometry.image_size, geometry.image_size) if augment.cutout else None,
            mix=draw_mix(order.seed, epoch, step, geometry.image_size, augment),
            jitter_S3=draw_jitter(keys[Purpose.JITTER], augment.color_jitter) if jitters else None,
        )


def eval_plans(
    geometry: SplitGeometry, eval_crop: float, batch_size: int, start_step: int, rank: int, world_size: int
) -> Iterator[BatchPlan]:
    """Every sample once, in id order, centre crop, no randomness; the last batch is smaller."""
    num_samples = len(geometry.kept_N2)
    for step in range(start_step, -(-num_samples // batch_size)):
        start = step * batch_size
        length = min(batch_size, num_samples - start)
        ids_S = np.arange(start + length * rank // world_size, start + length * (rank + 1) // world_size, dtype=np.int64)
        if not len(ids_S):
            continue  # a last batch smaller than the world leaves some ranks without a sample
        kept_S2 = geometry.kept_N2[ids_S]
        windows_S4 = center_windows(kept_S2[:, 0], kept_S2[:, 1], eval_crop)
        yield BatchPlan(
            epoch=0,
            step=step,
            ids_S=ids_S,
            windows_S4=windows_S4,
            flips_S=np.zeros(len(ids_S), np.int32),
            policy=None,
            cutout_S2=None,
            mix=None,
        )


def reading_ahead(plans: Iterator[BatchPlan], lead: int, advise: Callable[[BatchPlan], None]) -> Iterator[BatchPlan]:
    """The plans, `lead` of them later than they are drawn; `advise` is told each at once, so that its bytes are on their way."""
    coming: deque[BatchPlan] = deque()
    for plan in plans:
        advise(plan)
        coming.append(plan)
        if len(coming) > lead:
            yield coming.popleft()
    yield from coming
