"""Class counts, shot groups, the exponential profile and the two ways to choose images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.datasets import class_counts, exponential_counts, select_subset, shot_groups, stratified_split
from pipelines.types import ConfigError, DatasetError

label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=80)


@pytest.mark.parametrize(
    ("max_count", "num_classes", "imbalance_factor", "total"),
    [
        (500, 100, 100, 10847),
        (500, 100, 50, 12608),
        (500, 100, 10, 19573),
        (5000, 10, 100, 12406),
        (5000, 10, 50, 13996),
        (5000, 10, 10, 20431),
    ],
)
def test_profile_gives_published_totals(max_count: int, num_classes: int, imbalance_factor: float, total: int) -> None:
    counts_K = exponential_counts(max_count, num_classes, imbalance_factor)
    assert counts_K.sum() == total
    assert counts_K[0] == max_count
    assert counts_K[-1] == max_count // imbalance_factor


def test_profile_of_cifar10_at_factor_100() -> None:
    assert exponential_counts(5000, 10, 100).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@given(st.integers(1, 5000), st.integers(1, 300), st.floats(1, 1e4))
def test_profile_falls_from_max_count_to_at_least_one(max_count: int, num_classes: int, imbalance_factor: float) -> None:
    counts_K = exponential_counts(max_count, num_classes, imbalance_factor)
    assert counts_K.dtype == np.int64
    assert counts_K.shape == (num_classes,)
    assert counts_K[0] == max_count
    assert counts_K[-1] >= 1
    assert (np.diff(counts_K) <= 0).all()
    if num_classes > 1:
        assert abs(counts_K[-1] - max(1.0, max_count / imbalance_factor)) <= 1


@pytest.mark.parametrize(
    ("factor", "suggestion"), [(0.01, "; did you mean 100?"), (0.5, "; did you mean 2?"), (0, ""), (-3, ""), (float("nan"), "")]
)
def test_factor_below_one_is_refused(factor: float, suggestion: str) -> None:
    with pytest.raises(ConfigError) as error:
        exponential_counts(500, 100, factor)
    assert str(error.value) == f"imbalance_factor is largest/smallest class and must be >= 1, not {factor:g}{suggestion}"


def test_shot_groups_of_cifar100_at_factor_100() -> None:
    groups = shot_groups(exponential_counts(500, 100, 100))
    assert {name: int(members_K.sum()) for name, members_K in groups.items()} == {"many": 35, "medium": 35, "few": 30}


def test_shot_group_borders() -> None:
    groups = shot_groups(np.array([101, 100, 20, 19, 0]))
    assert [members_K.tolist().index(True) for members_K in groups.values()] == [0, 1, 3]


@given(st.lists(st.integers(0, 300), min_size=1))
def test_shot_groups_partition_the_classes(counts: list[int]) -> None:
    groups = shot_groups(np.array(counts))
    assert list(groups) == ["many", "medium", "few"]
    assert (np.sum(list(groups.values()), axis=0) == 1).all()


def test_class_counts_names_the_range_of_strange_labels() -> None:
    assert class_counts(np.array([2, 0, 2]), 4).tolist() == [1, 0, 2, 0]
    assert class_counts(np.array([], np.int64), 2).tolist() == [0, 0]
    with pytest.raises(DatasetError, match="labels run from 0 to 4, but 4 classes need 0 to 3"):
        class_counts(np.array([0, 4]), 4)


@given(label_lists, st.sampled_from(["first", "seeded"]), st.integers(0, 3))
def test_subset_keeps_the_asked_counts(labels: list[int], subset: str, seed: int) -> None:
    labels_N = np.array(labels)
    counts_K = (class_counts(labels_N, 7) + 1) // 2
    rows = select_subset(labels_N, counts_K, subset=subset, seed=seed)
    assert (np.diff(rows) > 0).all()
    assert class_counts(labels_N[rows], 7).tolist() == counts_K.tolist()
    assert rows.tolist() == select_subset(labels_N, counts_K, subset=subset, seed=seed).tolist()


def test_first_and_seeded_subsets() -> None:
    labels_N, counts_K = np.arange(200) % 2, np.array([3, 1])
    assert select_subset(labels_N, counts_K, subset="first", seed=0).tolist() == [0, 1, 2, 4]
    draws = {tuple(select_subset(labels_N, counts_K, subset="seeded", seed=seed)) for seed in range(5)}
    assert len(draws) == 5


@given(label_lists, st.floats(0, 0.6), st.floats(0, 0.39), st.integers(0, 3))
def test_stratified_split_is_a_partition_that_leaves_training_images(labels: list[int], test: float, val: float, seed: int) -> None:
    labels_N, fractions = np.array(labels), {"test": test, "val": val}
    parts = stratified_split(labels_N, 7, fractions, seed)
    assert list(parts) == ["train", "test", "val"]
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    counts = {part: class_counts(labels_N[rows], 7) for part, rows in parts.items()}
    present_K = class_counts(labels_N, 7) > 0
    assert (counts["train"][present_K] >= 1).all()
    for part, fraction in fractions.items():
        room_K = class_counts(labels_N, 7) >= 3
        expected_K = np.maximum(1, np.round(fraction * class_counts(labels_N, 7))) if fraction > 0 else np.zeros(7)
        assert (counts[part] <= expected_K).all()
        assert (counts[part][room_K] >= (fraction > 0)).all() or (part == "val" and test > 0.5)


def test_stratified_split_serves_test_before_val_in_rare_classes() -> None:
    labels_N = np.repeat([0, 1, 2, 3], [1, 2, 3, 100])
    parts = stratified_split(labels_N, 4, {"test": 0.1, "val": 0.2}, seed=0)
    counts = {part: class_counts(labels_N[rows], 4).tolist() for part, rows in parts.items()}
    assert counts == {"train": [1, 1, 1, 70], "test": [0, 1, 1, 10], "val": [0, 0, 1, 20]}
    again = stratified_split(labels_N, 4, {"test": 0.1, "val": 0.2}, seed=1)
    assert again["val"].tolist() != parts["val"].tolist()
