"""Compactness, separability and collapse: against all pairs of images, at the simplex, and where classes are missing."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bce3s.metrics import FeatureGeometry, FeatureStatistics, neural_collapse

CPU = torch.device("cpu")
TRAIN_COUNTS = np.array([500, 300, 50, 50, 5, 5])  # two classes of each shot group


def cloud(counts: tuple[int, ...] = (9, 7, 5, 4, 3, 2), dim: int = 8, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features [N, D] around a mean of their class each, all of them moved by `offset`, and labels [N], shuffled."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels_N = labels_N[torch.randperm(len(labels_N), generator=generator)]
    means_KD = torch.randn(len(counts), dim, generator=generator, dtype=torch.float64)
    spread_ND = torch.randn(len(labels_N), dim, generator=generator, dtype=torch.float64)
    return means_KD[labels_N] + 0.3 * spread_ND + offset, labels_N


def rows(num_classes: int = 6, dim: int = 8) -> Tensor:
    return torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(1))


def statistics_of(features_ND: Tensor, labels_N: Tensor, num_classes: int = 6, batches: int = 1) -> FeatureStatistics:
    statistics = FeatureStatistics(num_classes, features_ND.shape[1], CPU)
    for features, labels in zip(features_ND.chunk(batches), labels_N.chunk(batches), strict=True):
        statistics.add(features, labels)
    return statistics


def geometry_of(features_ND: Tensor, labels_N: Tensor, classifier_KD: Tensor | None = None, batches: int = 1) -> FeatureGeometry:
    classifier_KD = rows(dim=features_ND.shape[1]) if classifier_KD is None else classifier_KD
    return statistics_of(features_ND, labels_N, batches=batches).geometry(classifier_KD, TRAIN_COUNTS)


# ---- against definitions written down plainly, with every pair of images


def plain_compactness(features_ND: Tensor, labels_N: Tensor, label: int) -> float:
    units = [feature / feature.norm() for feature in features_ND[labels_N == label]]
    return float(torch.stack([one @ other for i, one in enumerate(units) for j, other in enumerate(units) if i != j]).mean())


def plain_nc1(features_ND: Tensor, labels_N: Tensor, num_classes: int) -> float:
    """tr(Σ_W Σ_B⁺)/K by outer products and numpy's pseudo-inverse."""
    means = torch.stack([features_ND[labels_N == k].mean(0) for k in range(num_classes)])
    within = sum(torch.outer(x - means[k], x - means[k]) for x, k in zip(features_ND, labels_N.tolist(), strict=True)) / len(features_ND)
    between = sum(torch.outer(mean - means.mean(0), mean - means.mean(0)) for mean in means) / num_classes
    assert isinstance(within, Tensor)
    assert isinstance(between, Tensor)
    return float(np.trace(within.numpy() @ np.linalg.pinv(between.numpy(), rcond=1e-9)) / num_classes)


@pytest.mark.parametrize("dim", [3, 8])  # fewer and more dimensions than classes
@pytest.mark.parametrize("batches", [1, 4])
def test_it_is_the_plain_definitions(dim: int, batches: int) -> None:
    features_ND, labels_N = cloud(dim=dim)
    found = geometry_of(features_ND, labels_N, batches=batches)
    compactness = [plain_compactness(features_ND, labels_N, k) for k in range(6)]
    assert found.compactness_K == pytest.approx(compactness, rel=1e-9)
    for group, members in (("all", slice(None)), ("many", slice(0, 2)), ("medium", slice(2, 4)), ("few", slice(4, 6))):
        spread = found.compactness[group]
        assert (spread.mean, spread.std) == pytest.approx((np.mean(compactness[members]), np.std(compactness[members])), rel=1e-9)
    means = torch.stack([features_ND[labels_N == k].mean(0) for k in range(6)])
    units = means / means.norm(dim=1, keepdim=True)
    others = torch.stack([torch.stack([units[j] @ units[k] for k in range(6) if k != j]) for j in range(6)])
    assert found.nearest_K == pytest.approx(others.amax(1).tolist(), rel=1e-9)
    assert found.separability["few"].mean == pytest.approx(float(1 - others[4:].mean()), rel=1e-9)
    assert found.separability["all"].std == pytest.approx(float(others.mean(1).std(correction=0)), rel=1e-9)
    assert found.class_means is not None
    assert found.class_means.separability == pytest.approx(found.separability["all"].mean)
    assert found.collapse.nc1 == pytest.approx(plain_nc1(features_ND, labels_N, 6), rel=1e-7)
    centred, classifier = means - means.mean(0), rows(dim=dim).double()
    lengths = centred.norm(dim=1)
    assert found.collapse.nc2_equinorm_means == pytest.approx(float(lengths.std(correction=0) / lengths.mean()), rel=1e-9)
    assert found.collapse.nc3 == pytest.approx(float((classifier / classifier.norm() - centred / centred.norm()).square().sum()), rel=1e-9)
    assert (found.num_images, found.num_classes) == (30, 6)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_a_mean_far_larger_than_the_spread_cancels_nothing_that_counts(offset: float) -> None:
    features_ND, labels_N = cloud(offset=offset)
    found = geometry_of(features_ND, labels_N)
    units = features_ND / features_ND.norm(dim=1, keepdim=True)
    for label in range(6):
        own = units[labels_N == label]
        apart = torch.stack([(one - other).square().sum() / 2 for i, one in enumerate(own) for j, other in enumerate(own) if i != j])
        assert 1 - (found.compactness_K[label] or 0) == pytest.approx(float(apart.mean()), rel=1e-3 if offset > 1e4 else 1e-6)
    assert found.collapse.nc1 == pytest.approx(plain_nc1(features_ND - offset, labels_N, 6), rel=1e-3 if offset > 1e4 else 1e-6)


def test_single_precision_features_of_a_large_mean_are_summed_in_double() -> None:
    features_ND, labels_N = cloud(counts=(200, 200, 200, 200, 200, 200), offset=300.0)
    features_ND = features_ND.float()
    found = geometry_of(features_ND, labels_N, batches=60)
    assert found.collapse.nc1 == pytest.approx(plain_nc1(features_ND.double(), labels_N, 6), rel=1e-6)


@given(order=st.permutations(range(30)), batches=st.integers(1, 30), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_order_batches_and_scale_of_the_features_do_not_matter(order: list[int], batches: int, scale: float) -> None:
    features_ND, labels_N = cloud()
    first = geometry_of(features_ND, labels_N).figures()
    parts = len(torch.zeros(30).chunk(batches))
    assert_alike(geometry_of(features_ND[order] * scale, labels_N[order], batches=parts).figures(), first)


def assert_alike(found: Any, expected: Any, rel: float = 1e-8) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_alike(found[name], expected[name], rel)
    elif expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, rel=rel, abs=1e-10)


# ---- the end of neural collapse


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 2), (6, 6), (6, 40), (60, 60)])
def test_a_simplex_is_collapse_itself(num_classes: int, dim: int) -> None:
    simplex_KD = torch.zeros(num_classes, dim, dtype=torch.float64)
    simplex_KD[:, :num_classes] = torch.eye(num_classes) - 1 / num_classes
    turned_KD = simplex_KD @ torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    labels_N = torch.arange(num_classes).repeat(3)
    statistics = statistics_of(5 * turned_KD[labels_N], labels_N, num_classes)
    found = statistics.geometry(0.2 * turned_KD, np.full(num_classes, 500))
    assert found.class_means is not None
    assert found.classifier is not None
    assert found.compactness["all"].mean == pytest.approx(1.0, abs=1e-12)
    assert found.class_means.mean == pytest.approx(-1 / (num_classes - 1), rel=1e-9)
    assert found.classifier.rms_to_simplex < 1e-7
    collapse = found.collapse
    figures = [collapse.nc1, collapse.nc2_equinorm_means, collapse.nc2_equinorm_rows, collapse.nc3]
    figures += [collapse.nc2_equiangular_means, collapse.nc2_equiangular_rows]
    assert max(1.0 if figure is None else abs(figure) for figure in figures) < 1e-7


def test_a_classifier_that_points_the_other_way_is_as_far_as_can_be() -> None:
    means_KD = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert neural_collapse(means_KD, None, -(means_KD - means_KD.mean(0)) * 3, None).nc3 == pytest.approx(4.0)


def test_nc1_grows_with_the_square_of_the_spread() -> None:
    features_ND, labels_N = cloud()
    means_ND = torch.stack([features_ND[labels_N == k].mean(0) for k in range(6)])[labels_N]
    once, twice = (geometry_of(means_ND + factor * (features_ND - means_ND), labels_N).collapse.nc1 for factor in (1, 2))
    assert once is not None
    assert twice == pytest.approx(4 * once)


# ---- what is missing


def test_absent_and_lonely_classes_are_left_out_and_said_to_be() -> None:
    features_ND, labels_N = cloud()
    kept_N = (labels_N != 4) & ((labels_N != 5) | (torch.arange(30) == int((labels_N == 5).nonzero()[0])))
    found = geometry_of(features_ND[kept_N], labels_N[kept_N])
    assert found.num_classes == 5
    assert (found.compactness_K[4], found.compactness_K[5], found.nearest_K[4]) == (None, None, None)
    assert found.compactness["few"].mean is None
    assert found.compactness["all"].num_classes == 4
    assert found.separability["few"].num_classes == 1
    # The others' figures are those of a set that never had class 4, in which the lonely image adds a mean and no scatter.
    alone = torch.tensor([0, 1, 2, 3, 0, 4])
    statistics = statistics_of(features_ND[kept_N], alone[labels_N[kept_N]], 5)
    without = statistics.geometry(rows()[[0, 1, 2, 3, 5]], TRAIN_COUNTS[[0, 1, 2, 3, 5]])
    assert_alike(vars(found.collapse), vars(without.collapse))
    num_kept, num_with_pairs = int(kept_N.sum()), int(kept_N.sum()) - 1
    expected = plain_nc1(features_ND[kept_N], alone[labels_N[kept_N]], 5) * num_kept / num_with_pairs
    assert found.collapse.nc1 == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("counts", [(0, 0, 0, 0, 0, 0), (3, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1)])
def test_too_little_for_a_figure_is_no_figure(counts: tuple[int, ...]) -> None:
    found = geometry_of(*cloud(counts))
    assert found.collapse.nc1 is None
    assert (found.compactness["all"].mean is None) == (max(counts) < 2)
    assert (found.class_means is None) == (sum(count > 0 for count in counts) < 2)
    assert found.classifier is not None
    json.dumps(found.to_dict(), allow_nan=False)


def test_dead_equal_and_broken_features_give_no_nonsense() -> None:
    features_ND, labels_N = cloud()
    dead = geometry_of(torch.zeros_like(features_ND), labels_N)
    equal = geometry_of(torch.ones_like(features_ND) * 0.1, labels_N)
    broken = geometry_of(torch.where(torch.arange(30)[:, None] == 3, math.inf, features_ND), labels_N)
    for found in (dead, equal, broken):
        assert found.collapse.nc1 is None
        assert found.collapse.nc3 is None
        json.dumps(found.to_dict(), allow_nan=False)
    assert dead.compactness["all"].mean == 0.0
    assert equal.compactness["all"].mean == pytest.approx(1.0)


def test_figures_hold_no_list_of_classes() -> None:
    def leaves(value: Any) -> list[Any]:
        return [leaf for each in value.values() for leaf in leaves(each)] if isinstance(value, dict) else [value]

    figures = geometry_of(*cloud()).figures()
    assert all(isinstance(leaf, (int, float)) for leaf in leaves(figures))
    assert figures["classifier"]["separability"] == pytest.approx(1 - figures["classifier"]["mean"])
