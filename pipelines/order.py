"""Who is drawn when: the instance and the partner stream as a pure function of (seed, epoch, step, rank).

An epoch is one global array of sample ids per stream. Global step g reads positions [g·GB, (g+1)·GB) and rank r of W its share of
those, so any world size sees the same global batches and the cursor of a run is (seed, epoch, step):

    position   0 ─────────── GB ─────────── 2·GB ─────── … ─── N
    rank of 2  0…0 1…1       0…0 1…1                     last batch: smaller, or dropped

The instance stream holds each sample once an epoch. The partner stream is as long and draws sample i with probability
q(class of i)/n_class, q from `class_probabilities` (method.md, "One step"; the reference's WeightedRandomSampler), or it holds the same
samples at the same places (`partner` "same").
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from pipelines.config import OrderConfig
from pipelines.randomness import FloatArray, Purpose, derive_key, key_at, permutation, position_keys, uniform_at, uniforms
from pipelines.types import IntArray

INSTANCE, PARTNER = 0, 1


def class_probabilities(class_counts_K: IntArray, config: OrderConfig, epoch: int) -> FloatArray:
    """float64 [K], sum 1: the probability that a partner draw falls into each class; classes without images get 0.

    `power`: q_k ∝ n_k^(1−p). `square-root`: p = 1/2, `class-balanced`: p = 1, `instance`: p = 0 (Kang et al. 2020, eq. 1).
    `effective-number`: an image weighs (1−β)/(1−β^n_k) (Cui et al. 2019, eq. 3). `progressive`: (1−t)·instance + t·class-balanced,
    t = epoch/(progressive_epochs−1), at most 1 (Kang et al. 2020, eq. 3).
    """
    counts = class_counts_K.astype(np.float64)
    present = counts > 0
    filled = np.where(present, counts, 1.0)
    exponents = {"instance": 0.0, "square-root": 0.5, "class-balanced": 1.0, "power": config.resample_exponent}
    if config.sampling in exponents:
        weights = filled ** (1.0 - exponents[config.sampling])
    elif config.sampling == "effective-number":
        weights = filled / -np.expm1(filled * np.log(max(config.effective_number_beta, 1e-300)))
    else:
        share = min(1.0, epoch / max(1, config.progressive_epochs - 1))
        weights = (1.0 - share) * filled / counts.sum() + share / present.sum()
    weights = np.where(present, weights, 0.0)
    probabilities_K: FloatArray = weights / weights.sum()
    return probabilities_K


@numba.njit(cache=True)
def _systematic_draws(
    quotas_K: FloatArray, offset: float, starts_K: IntArray, counts_K: IntArray, samples_N: IntArray, shifts_K: FloatArray, length: int
) -> IntArray:
    """One pass over evenly spaced points of the cumulative quotas: a class with quota x gets ⌊x⌋ or ⌈x⌉ draws, cycling its samples."""
    drawn = np.empty(length, np.int64)
    position, cumulative = 0, 0.0
    last = len(quotas_K) - 1
    for label in range(len(quotas_K)):
        cumulative += quotas_K[label]
        cursor = np.int64(shifts_K[label] * counts_K[label])
        while position < length and (position + offset < cumulative or label == last) and counts_K[label] > 0:
            drawn[position] = samples_N[starts_K[label] + cursor % counts_K[label]]
            cursor += 1
            position += 1
    return drawn[:position]


@numba.njit(cache=True)
def _independent_draws(
    key: np.uint64, cumulative_K: FloatArray, starts_K: IntArray, counts_K: IntArray, samples_N: IntArray, length: int
) -> IntArray:
    """Draw i takes two uniforms of the key at position i: one for the class, one for the sample within it."""
    num_classes, total = len(cumulative_K), cumulative_K[-1]
    # first_K[b]: the first class whose cumulative probability reaches cell b of K equal ones. Rounding is monotone, so no class before it
    # can hold a point of that cell, and the search from there takes two steps on average where bisection takes log2 K.
    cells_per_unit = num_classes / total
    first_K = np.empty(num_classes, np.int64)
    label = 0
    for cell in range(num_classes):
        while label < num_classes - 1 and int(cumulative_K[label] * cells_per_unit) < cell:
            label += 1
        first_K[cell] = label
    drawn = np.empty(length, np.int64)
    for position in range(length):
        draw_key = key_at(key, position)
        point = uniform_at(draw_key, 0) * total
        label = first_K[min(int(point * cells_per_unit), num_classes - 1)]
        while cumulative_K[label] <= point:
            label += 1
        drawn[position] = samples_N[starts_K[label] + np.int64(uniform_at(draw_key, 1) * counts_K[label])]
    return drawn


@dataclass(frozen=True)
class ClassTable:
    """Samples grouped by class: class k owns samples_N[starts_K[k] : starts_K[k] + counts_K[k]]."""

    samples_N: IntArray
    starts_K: IntArray
    counts_K: IntArray

    @classmethod
    def of(cls, labels_N: IntArray, num_classes: int) -> ClassTable:
        """Groups the samples of int [N] labels in 0…K−1 by class, by id within a class; O(N)."""
        counts_K = np.bincount(labels_N, minlength=num_classes).astype(np.int64)
        starts_K = np.concatenate([[0], np.cumsum(counts_K)[:-1]]).astype(np.int64)
        return cls(np.argsort(labels_N, kind="stable").astype(np.int64), starts_K, counts_K)


def draw_samples(table: ClassTable, config: OrderConfig, key: int, length: int, epoch: int = 0) -> IntArray:
    """Draws by class probability, uniformly within a class.

    Args:
        table: at least one sample.
        config: how classes weigh, and whether draws are independent or systematic.
        key: all randomness is a function of it, see `derive_key`.
        length: E, the number of draws; need not be N.
        epoch: where "progressive" stands; nothing else reads it.

    Returns:
        int64 [E] sample ids in random order. "systematic": class counts within one of E·q_k, and the samples of a class are used equally
        often to within one.
    """
    probabilities_K = class_probabilities(table.counts_K, config, epoch)
    if config.draw == "independent":
        independent_E: IntArray = _independent_draws(
            np.uint64(key), np.cumsum(probabilities_K), table.starts_K, table.counts_K, table.samples_N, length
        )
        return independent_E
    draws = uniforms(position_keys(key, np.arange(len(probabilities_K) + 1, dtype=np.int64)), 1)[:, 0]
    # Only classes with images take part, so that rounding in the last quota cannot ask an empty one for a sample.
    present = np.flatnonzero(table.counts_K > 0)
    drawn_E = _systematic_draws(
        probabilities_K[present] * length,
        draws[-1],
        table.starts_K[present],
        table.counts_K[present],
        table.samples_N,
        draws[present],
        length,
    )
    shuffled_E: IntArray = drawn_E[permutation(key, length)]
    return shuffled_E


class SampleOrder:
    """The order of one split.

    Args:
        labels_N: int [N], the class of each sample.
        num_classes: K.
        batch_size: GB, source images of a global step.
        seed: of the run.
        config: sampling of the partner stream and what happens to the last batch.
    """

    def __init__(self, labels_N: IntArray, num_classes: int, batch_size: int, seed: int, config: OrderConfig) -> None:
        """Groups the samples by class; O(N) once."""
        self.num_samples = len(labels_N)
        self.batch_size = batch_size
        self.seed = seed
        self.config = config
        self._table = ClassTable.of(labels_N, num_classes)

    @property
    def num_steps(self) -> int:
        """Steps of an epoch; the last one is smaller than the others unless `drop_last`."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full if self.config.drop_last or not rest else full + 1

    def instance_epoch(self, epoch: int) -> IntArray:
        """int64 [N]: a permutation of all samples."""
        return permutation(derive_key(self.seed, epoch, INSTANCE, Purpose.ORDER), self.num_samples)

    def partner_epoch(self, epoch: int) -> IntArray:
        """int64 [N]: draws with replacement by class probability, uniform within a class; or the instance stream once more."""
        if self.config.partner == "same":
            return self.instance_epoch(epoch)
        key = derive_key(self.seed, epoch, PARTNER, Purpose.ORDER)
        return draw_samples(self._table, self.config, key, self.num_samples, epoch)

    def step_positions(self, step: int, rank: int = 0, world_size: int = 1) -> IntArray:
        """int64 [B]: positions in the epoch that `rank` reads at `step`; ranks split a batch evenly, the last one too (to within one)."""
        start = step * self.batch_size
        length = min(self.batch_size, self.num_samples - start)
        low, high = length * rank // world_size, length * (rank + 1) // world_size
        return np.arange(start + low, start + high, dtype=np.int64)
