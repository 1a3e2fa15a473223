"""What a step draws keeps the present classes, is even, and owes nothing to the step or the class beside it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bce3s.losses.class_subset import class_draws, draw_class_subset, draw_classes

NUM_KEYS, NUM_CLASSES = 4000, 24


@given(
    labels=st.lists(st.integers(0, 39), min_size=1, max_size=80),
    ratio=st.sampled_from([0.05, 0.4, 0.99, 1.0]),
    key=st.integers(0, 2**63 - 1),
)
def test_class_subset_keeps_every_present_class_and_fills_up_to_the_ratio(labels: list[int], ratio: float, key: int) -> None:
    mask = draw_class_subset(torch.tensor(labels), 40, ratio, torch.tensor(key))
    assert mask[labels].all()
    assert int(mask.sum()) == max(len(set(labels)), int(40 * ratio))


def test_negatives_of_the_class_subset_are_drawn_evenly() -> None:
    masks = [draw_class_subset(torch.tensor([3]), 20, 0.4, torch.tensor(key)) for key in range(4000)]
    shares = torch.stack(masks).float().mean(0)
    others = torch.cat([shares[:3], shares[4:]])
    # 7 of the 19 other classes each time: share 0.368, standard deviation of the mean 0.0076.
    assert (others - 7 / 19).abs().max() < 5 * 0.0076


# Keys are hashes; numbers in a row, and high bits in a row, are the hardest that a mixer could be given.
@pytest.fixture(scope="module", params=[0, 38], ids=["low bits", "high bits"])
def draws(request: pytest.FixtureRequest) -> Tensor:
    """[keys, K] in 0…1."""
    keys = (torch.arange(NUM_KEYS) + 5) << request.param
    return torch.stack([class_draws(key, NUM_CLASSES) for key in keys]).double() / 2**62


def test_draws_fill_their_range_evenly(draws: Tensor) -> None:
    counts = torch.bincount((draws * 64).long().flatten(), minlength=64).double()
    assert len(counts) == 64
    assert chi_square_z(counts) < 4


def test_every_class_takes_every_rank_equally_often(draws: Tensor) -> None:
    ranks = draws.argsort(1).argsort(1)
    for k in range(NUM_CLASSES):
        assert chi_square_z(torch.bincount(ranks[:, k], minlength=NUM_CLASSES).double()) < 5


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, 1), (1, -1), (2, 0)])
def test_draws_of_neighbouring_keys_and_classes_are_independent(draws: Tensor, step: tuple[int, int]) -> None:
    of_keys, of_classes = step
    shifted = draws.roll((-of_keys, -of_classes), (0, 1))[: NUM_KEYS - 2, 1:-1]
    here = draws[: NUM_KEYS - 2, 1:-1]
    pairs = torch.bincount(((here * 8).long() * 8 + (shifted * 8).long()).flatten(), minlength=64).double()
    assert chi_square_z(pairs) < 4


@given(num_drawn=st.integers(2, 30), key=st.integers(0, 2**63 - 1))
def test_drawn_classes_are_distinct_and_the_same_for_the_same_key(num_drawn: int, key: int) -> None:
    drawn = draw_classes(torch.tensor(key), 30, num_drawn)
    assert len(set(drawn.tolist())) == num_drawn
    assert set(drawn.tolist()) <= set(range(30))
    assert torch.equal(drawn, draw_classes(torch.tensor(key), 30, num_drawn))


def test_classes_of_the_uniform_term_are_drawn_apart_from_the_subset() -> None:
    subset = torch.stack([draw_class_subset(torch.tensor([0]), NUM_CLASSES, 0.5, torch.tensor(key)) for key in range(NUM_KEYS)])
    drawn = torch.zeros_like(subset)
    for key in range(NUM_KEYS):
        drawn[key, draw_classes(torch.tensor(key), NUM_CLASSES, 12)] = True
    both = (subset & drawn)[:, 1:].double().mean(0)
    # 11 of 23 others in the one, 12 of 24 in the other.
    assert (both - 11 / 23 / 2).abs().max() < 5 * math.sqrt(0.24 * 0.76 / NUM_KEYS)


def chi_square_z(counts: Tensor) -> float:
    """How many standard deviations the counts' chi-square lies from that of an even distribution."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return abs(float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)
