"""A run's log as points: every mean by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bce3s.report.log_points import MAX_POINTS, epoch_points, step_points


def step(epoch: int, number: int, rate: float = 100.0, wait: float = 0.1, **more: float) -> dict[str, Any]:
    return {"kind": "step", "epoch": epoch, "step": number, "images_per_s": rate, "data_wait_share": wait, "ready_share": 1.0, **more}


def test_points_know_their_place_and_what_is_a_term() -> None:
    """Ten steps an epoch: 155 images, 16 a step, the last one 11; `class_subset_size` is no loss."""
    lines = [step(0, 3, total=5.0, joint=4.0, class_subset_size=7.0), step(1, 7, total=3.0, joint=2.0, contrastive=9.0)]
    lines.append({"kind": "epoch", "epoch": 0, "images_per_s": 15.5, "train_s": 10.0, "data_wait_share": 0.2, "split": "val", "total": 4.5})
    first, second = step_points(lines, 16, 0)
    assert (first.epoch, second.epoch) == (0.4, 1.8)
    assert first.terms == {"total": 5.0, "joint": 4.0}
    assert second.terms == {"total": 3.0, "joint": 2.0, "contrastive": 9.0}
    assert (first.views_per_s, first.device_memory_bytes) == (None, None)
    (epoch,) = epoch_points(lines)
    assert (epoch.epoch, epoch.split, epoch.accuracies, epoch.terms) == (1, "val", {}, {"total": 4.5})


def test_lines_that_say_more_are_believed() -> None:
    line = step(2, 4, num_steps=20, epochs=9, views_per_s=300.0, device_memory_bytes=5.0, total=1.0)
    (point,) = step_points([line], 16, 99)
    assert (point.epoch, point.views_per_s, point.device_memory_bytes, point.terms) == (2.25, 300.0, 5.0, {"total": 1.0})


def test_the_steps_of_an_epoch_are_not_one_more_by_rounding() -> None:
    """160 images, 16 a step; their rate times its time is 160.00000000000003."""
    rate, train_s = 53.33333333333334, 3.0
    assert rate * train_s > 160
    epoch = {"kind": "epoch", "epoch": 0, "images_per_s": rate, "train_s": train_s, "data_wait_share": 0.0, "split": "test", "total": 1.0}
    assert step_points([step(0, 4, total=1.0), epoch], 16, 0)[0].epoch == 0.5


def test_first_epoch_in_progress_takes_its_length_from_the_split() -> None:
    (point,) = step_points([step(0, 4, total=1.0)], 10, 95)
    assert point.epoch == 0.5
    (point,) = step_points([step(0, 4, total=1.0)], 10, 0)
    assert point.epoch == 1.0  # nobody says more than that five steps were done


def test_a_long_log_is_thinned_to_means_over_time() -> None:
    """Two lines a point: 100 images at 100/s and 100 at 300/s take 1 + 1/3 s: 150/s, and a quarter of that time at a wait of 0.5."""
    lines = [step(0, i, *((100.0, 0.1) if i % 2 == 0 else (300.0, 0.5)), total=float(i)) for i in range(2 * MAX_POINTS)]
    points = step_points(lines, 1, 2 * MAX_POINTS)
    assert len(points) == MAX_POINTS
    assert points[0].images_per_s == pytest.approx(150.0)
    assert points[0].data_wait_share == pytest.approx(0.75 * 0.1 + 0.25 * 0.5)
    assert [points[0].terms["total"], points[-1].terms["total"]] == [0.5, 2 * MAX_POINTS - 1.5]
    assert points[-1].epoch == 1.0
    assert len(step_points([*lines, step(1, 0, total=1.0)], 1, 2 * MAX_POINTS)) <= MAX_POINTS


def test_an_empty_log_has_no_points() -> None:
    assert step_points([], 16, 0) == ()
    assert epoch_points([{"kind": "summary"}]) == ()


def test_an_evaluated_epoch_keeps_empty_groups() -> None:
    line = {"kind": "epoch", "epoch": 4, "images_per_s": 1.0, "train_s": 1.0, "data_wait_share": 0.0, "split": "test", "total": 1.0}
    (point,) = epoch_points([line | {"all": 50.0, "many": None, "medium": 60.0, "few": 1.0, "balanced": 50.0, "ece": 3.0}])
    assert point.accuracies == {"all": 50.0, "many": None, "medium": 60.0, "few": 1.0, "balanced": 50.0, "ece": 3.0}
    assert point.terms == {"total": 1.0}
