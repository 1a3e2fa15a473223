"""The pictures of a classifier and of its mistakes, against numbers counted by hand or the long way."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bce3s.report.confusions import Predictions, encoded_image, most_confused, picture_pairs, thumbnail_of
from bce3s.report.cosine_blocks import MAX_BINS, MAX_CELLS, cosine_pictures
from bce3s.report.findings import CosineHistogram, CosineMap
from pipelines.format import open_shards
from pipelines.types import ShardError
from tests.conftest import MakeShards, encode, picture


def test_three_rows_by_hand() -> None:
    """Rows at 0°, 90° and 180°: cosines 0, −1 and 0; from head to tail they are classes 2, 0, 1."""
    rows_KD = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0]])
    histogram, cosine_map = _pictures(rows_KD, [5, 1, 9])
    assert histogram.num_pairs == sum(histogram.counts) == 3
    assert histogram.simplex == -0.5
    assert _pairs_at(histogram, -1.0) == 1
    assert _pairs_at(histogram, 0.0) == 2
    assert cosine_map.cell_classes == ((2,), (0,), (1,))
    np.testing.assert_allclose(cosine_map.cells, [[1, -1, 0], [-1, 1, 0], [0, 0, 1]], atol=1e-12)


def test_two_classes_have_one_pair() -> None:
    histogram, cosine_map = _pictures(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), [3, 2])
    assert (histogram.num_pairs, sum(histogram.counts), histogram.simplex) == (1, 1, -1.0)
    assert cosine_map.cells == ((1.0, -1.0), (-1.0, 1.0))


@pytest.mark.parametrize("count", [65, 600])
def test_many_classes_against_the_whole_matrix(count: int) -> None:
    """More classes than cells, and at 600 more than one block of rows; counts repeat, so ties are sorted by label."""
    generator = np.random.default_rng(count)
    rows_KD, counts_K = generator.normal(size=(count, 6)), generator.integers(1, 20, count)
    histogram, cosine_map = _pictures(torch.from_numpy(rows_KD), counts_K.tolist())
    units_KD = rows_KD / np.linalg.norm(rows_KD, axis=1, keepdims=True)
    cosines_KK = units_KD @ units_KD.T
    expected, _ = np.histogram(cosines_KK[np.triu_indices(count, 1)], np.array(histogram.edges))
    assert list(histogram.counts) == expected.tolist()
    assert len(histogram.counts) <= MAX_BINS
    assert len(cosine_map.cells) == MAX_CELLS
    assert [k for cell in cosine_map.cell_classes for k in cell] == sorted(range(count), key=lambda k: (-counts_K[k], k))
    for row, members in enumerate(cosine_map.cell_classes):
        for column, others in enumerate(cosine_map.cell_classes):
            pairs = [cosines_KK[i, j] for i in members for j in others if i != j]
            assert cosine_map.cells[row][column] == pytest.approx(np.mean(pairs) if pairs else 1.0, abs=1e-12)


def test_bins_are_as_fine_as_what_there_is_to_see() -> None:
    """Rows near the simplex differ in the third decimal; bins of a tenth would show one bar."""
    simplex_KD = torch.eye(100, dtype=torch.float64) - 0.01
    histogram, _ = _pictures(simplex_KD + 2e-4 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0)), [1] * 100)
    assert histogram.edges[1] - histogram.edges[0] <= 0.0021
    assert histogram.edges[0] <= histogram.simplex <= histogram.edges[-1]
    assert len(histogram.counts) >= 3


@pytest.mark.parametrize("rows_KD", [torch.ones(1, 3), torch.tensor([[1.0, torch.nan], [0.0, 1.0]])])
def test_no_picture_of_one_class_or_of_broken_rows(rows_KD: torch.Tensor) -> None:
    assert cosine_pictures(rows_KD, np.ones(len(rows_KD), np.int64)) is None


def test_most_confused_by_hand() -> None:
    """Three of four images of class 0 are taken for 1; two of class 2's two, and two of class 1's four, for 0: shares decide."""
    labels_N = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    predicted_N = np.array([1, 0, 1, 1, 0, 1, 0, 1, 0, 0])
    found = most_confused(labels_N, predicted_N, 10 * np.arange(10), 3)
    assert [each[:4] for each in found] == [(0, 1, 3, 0.75), (2, 0, 2, 1.0), (1, 0, 2, 0.5)]
    assert found[0].ids.tolist() == [0, 20, 30]
    assert [each[:2] for each in most_confused(labels_N, predicted_N, np.arange(10), 3, most=1)] == [(0, 1)]
    assert most_confused(labels_N, labels_N, np.arange(10), 3) == []


def test_predictions_come_back_in_the_splits_order() -> None:
    predictions = Predictions()
    assert [len(each) for each in predictions.collected()] == [0, 0]
    ids_S = np.array([4, 2])
    predictions.add(ids_S, torch.tensor([7, 8]))
    ids_S[:] = 0  # a loader may use its array again
    predictions.add(np.array([3]), torch.tensor([9]))
    assert [each.tolist() for each in predictions.collected()] == [[2, 3, 4], [8, 9, 7]]


def test_pictures_are_of_the_very_images(make_shards: MakeShards) -> None:
    shards = make_shards()
    split = shards.split("test")
    labels_N = split.labels_N
    predicted_N = np.where(labels_N == 1, 2, labels_N)
    pairs, complaints = picture_pairs(most_confused(labels_N, predicted_N, np.arange(len(labels_N)), 4), shards, "test")
    assert not complaints
    (pair,) = pairs
    assert (pair.true_class, pair.predicted_class, pair.count, pair.share) == (1, 2, 5, 1.0)
    wanted = [np.asarray(Image.open(io.BytesIO(bytes(each)))) for each in split.encoded(np.flatnonzero(labels_N == 1)[:3])]
    for shown, pixels in zip(pair.mistaken, wanted, strict=True):
        assert np.abs(_decoded(shown.jpeg).astype(int) - pixels).mean() < 12  # a JPEG of a PNG
        assert (shown.width_px, shown.height_px, shown.alt) == (32, 32, "an image of class-1 that was taken for class-2")
    assert pair.example is not None
    train = shards.split("train")
    (encoded,) = train.encoded(np.flatnonzero(train.labels_N == 2)[:1])
    assert np.abs(_decoded(pair.example.jpeg).astype(int) - np.asarray(Image.open(io.BytesIO(bytes(encoded))))).mean() < 12


def test_large_pictures_are_made_small() -> None:
    small = thumbnail_of(encode(picture(1, 1, 300, 150), "jpg"), "it")
    assert (small.height_px, small.width_px) == (96, 48)
    assert _decoded(small.jpeg).shape == (96, 48, 3)


def test_a_picture_that_does_not_decode_is_an_error() -> None:
    with pytest.raises(ShardError, match="does not decode"):
        thumbnail_of(b"no image", "it")


def test_a_shard_that_was_cut_short_costs_its_pictures_only(make_shards: MakeShards, tmp_path: Path) -> None:
    copied = tmp_path / "shards"
    shutil.copytree(make_shards().root, copied)
    shards = open_shards(copied)
    split = shards.split("test")
    assert encoded_image(shards, split, 2) == split.encoded(np.array([2]))[0].tobytes()
    path = split.paths[0]
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ShardError, match="truncated"):
        encoded_image(shards, split, 2)
    labels_N = split.labels_N
    (pair,), complaints = picture_pairs(most_confused(labels_N, labels_N.clip(1), np.arange(len(labels_N)), 4), shards, "test")
    assert (pair.mistaken, pair.count) == ((), 5)
    assert pair.example is not None  # of the train split, which is whole
    (complaint,) = complaints
    assert complaint.startswith("Pictures of the test split are left out: ")
    assert str(path) in complaint


def _pictures(rows_KD: torch.Tensor, counts: list[int]) -> tuple[CosineHistogram, CosineMap]:
    found = cosine_pictures(rows_KD, np.array(counts))
    assert found is not None
    return found


def _pairs_at(histogram: CosineHistogram, cosine: float) -> int:
    edges = np.array(histogram.edges)
    return int(np.array(histogram.counts)[(edges[:-1] <= cosine + 1e-6) & (cosine - 1e-6 <= edges[1:])].sum())


def _decoded(jpeg: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(jpeg))
    assert image.format == "JPEG"
    return np.asarray(image)
