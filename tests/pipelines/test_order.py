"""The order contract: exact once, right proportions, a pure function of its cursor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import SAMPLINGS, OrderConfig
from pipelines.order import SampleOrder, class_probabilities
from pipelines.types import ConfigError


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int64)


def order_of(counts: list[int], batch_size: int = 16, seed: int = 3, **config: object) -> SampleOrder:
    return SampleOrder(labels_of(counts), len(counts), batch_size, seed, OrderConfig(**config))  # type: ignore[arg-type]


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_instance_stream_holds_every_sample_exactly_once(counts: list[int], seed: int, epoch: int) -> None:
    ids = order_of(counts, seed=seed).instance_epoch(epoch)
    assert sorted(ids.tolist()) == list(range(sum(counts)))


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    batch_size=st.integers(1, 50),
    world_size=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_ranks_together_read_each_position_once_and_in_the_order_of_one_rank(
    counts: list[int], batch_size: int, world_size: int, drop_last: bool
) -> None:
    order = order_of(counts, batch_size, drop_last=drop_last)
    for step in range(order.num_steps):
        shared = np.concatenate([order.step_positions(step, rank, world_size) for rank in range(world_size)])
        np.testing.assert_array_equal(shared, order.step_positions(step))
    seen = order.num_steps * batch_size if drop_last else sum(counts)
    assert sum(len(order.step_positions(step)) for step in range(order.num_steps)) == seen


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("draw", ["independent", "systematic"])
class TestPartnerStream:
    def test_is_a_pure_function_of_seed_and_epoch(self, sampling: str, draw: str) -> None:
        first = order_of([50, 10, 2], sampling=sampling, draw=draw)
        again = order_of([50, 10, 2], sampling=sampling, draw=draw)
        other = order_of([50, 10, 2], sampling=sampling, draw=draw, seed=4)
        first.instance_epoch(7)  # drawing something else in between changes nothing
        np.testing.assert_array_equal(first.partner_epoch(5), again.partner_epoch(5))
        assert (first.partner_epoch(5) != first.partner_epoch(6)).any()
        assert (first.partner_epoch(5) != other.partner_epoch(5)).any()

    def test_draws_classes_in_the_promised_proportions(self, sampling: str, draw: str) -> None:
        counts = [3000, 900, 0, 90, 10]
        order = order_of(counts, sampling=sampling, draw=draw, resample_exponent=0.3, progressive_epochs=10)
        labels, size = labels_of(counts), sum(counts)
        probabilities = class_probabilities(np.array(counts), order.config, epoch=4)
        drawn = np.bincount(labels[order.partner_epoch(4)], minlength=5)
        assert drawn.sum() == size
        assert drawn[2] == 0
        # Within one of the quota, or within five standard deviations of a binomial count.
        slack = 1.0 if draw == "systematic" else 5 * np.sqrt(size * probabilities * (1 - probabilities)) + 1e-9
        assert (np.abs(drawn - size * probabilities) <= slack).all()

    def test_samples_of_a_class_are_drawn_evenly(self, sampling: str, draw: str) -> None:
        order = order_of([400, 20], sampling=sampling, draw=draw, progressive_epochs=1)
        labels = labels_of([400, 20])
        drawn = np.bincount(np.concatenate([order.partner_epoch(epoch) for epoch in range(40)]), minlength=420)
        for label in (0, 1):
            uses = drawn[labels == label]
            chi_square = ((uses - uses.mean()) ** 2 / uses.mean()).sum()
            assert chi_square < len(uses) + 5 * np.sqrt(2 * len(uses))


def test_class_counts_of_a_balanced_epoch_differ_by_at_most_one() -> None:
    counts = [500, 107, 31, 8, 2]
    order = order_of(counts, sampling="class-balanced", draw="systematic")
    drawn = np.bincount(labels_of(counts)[order.partner_epoch(0)], minlength=5)
    assert drawn.max() - drawn.min() <= 1


def test_class_probabilities_follow_their_definitions() -> None:
    counts = np.array([100, 25, 4])

    def q(epoch: int = 0, **config: object) -> np.ndarray:
        return class_probabilities(counts, OrderConfig(**config), epoch)  # type: ignore[arg-type]

    np.testing.assert_allclose(q(sampling="instance"), counts / 129)
    np.testing.assert_allclose(q(sampling="power", resample_exponent=0.0), counts / 129)
    np.testing.assert_allclose(q(sampling="power", resample_exponent=1.0), np.full(3, 1 / 3))
    np.testing.assert_allclose(q(sampling="class-balanced"), np.full(3, 1 / 3))
    np.testing.assert_allclose(q(sampling="square-root"), np.array([10, 5, 2]) / 17)
    np.testing.assert_allclose(q(sampling="power", resample_exponent=0.5), np.array([10, 5, 2]) / 17)
    beta = 0.99
    weights = counts * (1 - beta) / (1 - beta**counts)
    np.testing.assert_allclose(q(sampling="effective-number", effective_number_beta=beta), weights / weights.sum())
    np.testing.assert_allclose(q(sampling="progressive", progressive_epochs=11, epoch=0), counts / 129)
    np.testing.assert_allclose(q(sampling="progressive", progressive_epochs=11, epoch=5), 0.5 * counts / 129 + 0.5 / 3)
    np.testing.assert_allclose(q(sampling="progressive", progressive_epochs=11, epoch=99), np.full(3, 1 / 3))


def test_golden_order_is_the_same_on_every_machine_and_version() -> None:
    order = SampleOrder(np.repeat([0, 1, 2], [5, 3, 2]), 3, 4, 0, OrderConfig(sampling="class-balanced"))
    assert order.instance_epoch(0).tolist() == [5, 1, 4, 6, 8, 3, 7, 2, 9, 0]
    assert order.partner_epoch(0).tolist() == [9, 9, 8, 1, 7, 6, 2, 6, 0, 8]


def test_unknown_sampling_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown sampling 'balanced'; known: .*class-balanced"):
        OrderConfig(sampling="balanced")
