"""Cosines of all pairs: against all pairs at once, at the simplex, and block borders."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bce3s.metrics import PairwiseCosines, cosines, pairwise_cosines


def simplex(num_classes: int) -> Tensor:
    """float64 [K, K]: as far apart as K vectors can be."""
    return torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes


def found_in(vectors_KD: Tensor) -> PairwiseCosines:
    found = pairwise_cosines(vectors_KD)
    assert found is not None
    return found


@pytest.mark.parametrize("block_rows", [1, 4, 7, 100])
def test_it_is_all_pairs_at_once(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosines, "_BLOCK_ROWS", block_rows)
    vectors_KD = torch.randn(13, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    units = vectors_KD.double() / vectors_KD.double().norm(dim=1, keepdim=True)
    pairs = torch.stack([units[j] @ units[k] for j in range(13) for k in range(13) if j != k]).reshape(13, 12)
    found, target = found_in(vectors_KD), -1 / 12
    assert found.mean == pytest.approx(float(pairs.mean()), rel=1e-12)
    assert found.std == pytest.approx(float(pairs.std(correction=0)), rel=1e-12)
    assert found.separability == pytest.approx(1 - float(pairs.mean()), rel=1e-12)
    assert found.max == pytest.approx(float(pairs.max()), rel=1e-12)
    assert found.rms_to_simplex == pytest.approx(float((pairs - target).square().mean().sqrt()), rel=1e-12)
    assert found.mean_abs_to_simplex == pytest.approx(float((pairs - target).abs().mean()), rel=1e-12)
    assert found.nearest_K == pytest.approx(pairs.amax(1).tolist(), rel=1e-12)
    assert found.mean_K == pytest.approx(pairs.mean(1).tolist(), rel=1e-12)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 600])
def test_a_simplex_is_none_away_from_itself(num_classes: int) -> None:
    found = found_in(simplex(num_classes) * 7)
    assert found.mean == pytest.approx(-1 / (num_classes - 1), rel=1e-9)
    assert found.separability == pytest.approx(num_classes / (num_classes - 1), rel=1e-9)
    assert max(found.std, found.rms_to_simplex, found.mean_abs_to_simplex) < 1e-12


def test_vectors_that_are_almost_one_keep_their_deviation() -> None:
    # cos ≈ 1 − 10⁻⁸: in float32 all of them are 1, and E[c²] − E[c]² in float64 leaves one digit.
    vectors_KD = 1e4 + torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = vectors_KD / vectors_KD.norm(dim=1, keepdim=True)
    distances = torch.stack([(units[j] - units[k]).square().sum() / 2 for j in range(20) for k in range(20) if j != k])
    found = found_in(vectors_KD)
    assert found.separability == pytest.approx(float(distances.mean()), rel=1e-6)
    assert found.std == pytest.approx(float(distances.std(correction=0)), rel=1e-6)


def test_one_vector_has_no_pair_and_a_broken_one_no_figure() -> None:
    assert pairwise_cosines(torch.ones(1, 4)) is None
    assert pairwise_cosines(torch.tensor([[1.0, math.nan], [1.0, 2.0]])) is None


def test_a_zero_row_is_at_right_angles_to_all() -> None:
    assert found_in(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])).mean == pytest.approx(1 / 3)


def test_lists_of_classes_stay_out_of_the_figures() -> None:
    assert set(found_in(simplex(3)).figures()) == {"mean", "std", "max", "separability", "rms_to_simplex", "mean_abs_to_simplex"}
