"""What a log says of a run: where it is, how long it will take, and how its figures went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bce3s.progress import Standing
from bce3s.progress.sentences import duration, epoch_sentence, position_sentence, sparkline
from tests.bce3s.progress.logs import SUMMARY, epoch_line, lines_until, step_line, write_run


def standing_of(lines: list[dict[str, Any]], folder: Path, **environment: Any) -> Standing:
    standing = Standing.of_folder(write_run(folder, [], **environment))
    for line in lines:
        standing.feed(line)
    return standing


def test_the_time_left_is_that_of_the_steps_and_evaluations_left(tmp_path: Path) -> None:
    standing = standing_of(lines_until(3, 39), tmp_path)
    assert (standing.epoch, standing.step, standing.num_steps, standing.epochs) == (3, 40, 100, 10)
    assert standing.epoch_left_s == pytest.approx(30.0)
    assert standing.left_s == pytest.approx(30.0 + 6 * 50.0 + 4 * 4.0)  # evaluations after epochs 4, 6, 8 and 10
    assert standing.share_done == pytest.approx(0.34)
    standing.step = 90  # as the trainer counts on between two lines
    assert standing.epoch_left_s == pytest.approx(5.0)
    standing.age_s = 3.0  # as one looks on from elsewhere
    assert standing.epoch_left_s == pytest.approx(2.0)
    assert standing.left_s == pytest.approx(5.0 + 6 * 50.0 + 4 * 4.0 - 3.0)


def test_a_slower_epoch_shows_at_once(tmp_path: Path) -> None:
    standing = standing_of([*lines_until(3, -1), step_line(3, 19, epoch_s=20.0)], tmp_path)
    assert standing.epoch_left_s == pytest.approx(80.0)


def test_a_finished_run_has_nothing_left(tmp_path: Path) -> None:
    standing = standing_of([*lines_until(10, -1), SUMMARY], tmp_path)
    assert (standing.left_s, standing.share_done) == (0.0, 1.0)


def test_accuracies_are_those_of_the_last_evaluation_and_say_of_which(tmp_path: Path) -> None:
    standing = standing_of(lines_until(3, 39), tmp_path)  # epoch 3 was not evaluated
    assert (standing.accuracies["all"], standing.accuracies["few"], standing.accuracies_of, standing.split) == (41.0, None, 1, "val")
    assert standing.best == (41.0, 1)
    standing.feed(epoch_line(5, evaluated=True) | {"all": 12.0})
    assert standing.best == (41.0, 1)
    assert list(standing.trend("all")) == [41.0, 12.0]


def test_trends_go_by_step_until_there_are_epochs_enough(tmp_path: Path) -> None:
    early, late = standing_of(lines_until(1, 39), tmp_path), standing_of(lines_until(4, 39), tmp_path)
    assert len(early.trend("total")) == 5 + 2
    assert list(late.trend("total")) == [8.5, 7.5, 6.5, 5.5]
    assert "class_subset_size" not in late.terms


def test_a_log_of_before_tells_what_it_can(tmp_path: Path) -> None:
    """Lines once said neither how many steps there are, nor how long they take."""
    new = ("num_steps", "epochs", "epoch_s", "eval_s", "views_per_s", "device_memory_bytes")
    old = [{name: value for name, value in line.items() if name not in new} for line in lines_until(3, 39)]
    standing = standing_of(old, tmp_path)
    assert standing.left_s == pytest.approx(7 * 50.0)
    assert standing.epoch_left_s is None
    assert position_sentence(standing) == "epoch   4/10  step 40  loss 5.610  1000 source images/s  data wait 2%  5:50 left"


def test_the_record_says_whose_run_it_is(tmp_path: Path) -> None:
    standing = standing_of([], tmp_path, world_size=8)
    assert (standing.title, standing.place) == ("bce3s · resnet32-cifar · cifar10-lt", "NVIDIA H100, bf16, 8 ranks")
    assert standing_of([], tmp_path, stage=2, gpu=None).title == "bce3s stage two · resnet32-cifar · cifar10-lt"
    assert Standing.of_folder(tmp_path).epochs == 6


def test_a_broken_run_and_a_stopped_one_say_why(tmp_path: Path) -> None:
    broken = standing_of([{"kind": "broken", "epoch": 1, "step": 2, "ids": [3]}], tmp_path)
    assert (broken.broken, broken.stopped) == (True, "the loss is not finite from step 3 of epoch 2 on")
    stopped = standing_of([{"kind": "stopped", "epoch": 1, "step": 2, "reason": "stopped by SIGTERM"}], tmp_path)
    assert (stopped.broken, stopped.stopped) == (False, "stopped by SIGTERM")


def test_the_lines_that_stay(tmp_path: Path) -> None:
    standing = standing_of(lines_until(2, -1), tmp_path)
    assert epoch_sentence(epoch_line(1, evaluated=True), standing) == (
        "epoch   2/10  loss 7.500  1000 source images/s  data wait 2%  all 41.00  many 50.00  medium 20.00  few n/a  6:56 left"
    )
    assert epoch_sentence(epoch_line(1), standing, with_time=False).endswith("data wait 2%")


@pytest.mark.parametrize(("seconds", "text"), [(None, "–"), (0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (360000, "100:00:00")])
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_sparkline_spans_its_values() -> None:
    assert sparkline([9.0, 0.0, 3.0, 6.0], 3) == "▁▄▇"
    assert sparkline([2.0, 2.0], 5) == "▁▁"
    assert sparkline([1.0], 5) == sparkline([1.0, 2.0], 0) == ""
