"""What counts as a regression between two profiles, on made-up samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bce3s.throughput.compare import compare_rows, differences, lost_rows, needed_rows, read_profile
from bce3s.throughput.rows import Row
from pipelines.types import UserError


def row(*rates: float, key: str = "loader") -> Row:
    return Row(key=key, rates=rates)


@pytest.mark.parametrize(
    ("before", "after", "outcome", "ratio"),
    [
        ((100, 101, 102), (80, 81, 82), "slower", 81 / 101),
        ((100, 101, 102), (120, 121, 122), "faster", 121 / 101),
        ((100, 101, 102), (97, 98, 99), "same", 98 / 101),  # ranges apart, but less than the threshold
        ((70, 100, 130), (60, 80, 90), "same", 0.8),  # more than the threshold, but within the noise
        ((70, 100, 130), (50, 60, 69), "slower", 0.6),
        ((100, 101, 102), (100, 101, 102), "same", 1.0),
    ],
)
def test_a_change_is_more_than_noise_and_threshold(before: Any, after: Any, outcome: str, ratio: float) -> None:
    (change,) = compare_rows([row(*before)], [row(*after)], 0.05)
    assert (change.outcome, change.ratio) == (outcome, pytest.approx(ratio))


def test_the_threshold_is_the_users() -> None:
    before, after = [row(100, 101, 102)], [row(80, 81, 82)]
    assert compare_rows(before, after, 0.25)[0].outcome == "same"
    assert compare_rows(before, after, 0.0)[0].outcome == "slower"


def test_only_rows_measured_in_both_are_compared_and_lost_ones_are_named() -> None:
    before = [row(1.0), row(2.0, key="step.channels_last"), Row(key="step.graph", reason="needs a CUDA device")]
    after = [row(1.0), Row(key="step.channels_last", reason="out of memory"), row(3.0, key="step.graph")]
    assert [change.key for change in compare_rows(before, after, 0.05)] == ["loader"]
    assert [lost.name for lost in lost_rows(before, after)] == ["step (eager, channels-last)"]


def test_end_to_end_and_the_path_of_the_earlier_run_are_needed() -> None:
    assert needed_rows({"verdict": {"path": ["loader", "step.contiguous"]}}) == {"together.real", "loader", "step.contiguous"}
    assert needed_rows({"verdict": None}) == needed_rows({}) == {"together.real"}


def test_what_makes_two_profiles_hard_to_compare_is_said() -> None:
    before = {"data": {"fingerprint": "a" * 64}, "hardware": {"cpu": "X", "usable_cores": 2, "gpu": None}, "loader": "dali"}
    assert differences(before, before) == []
    after = {**before, "data": {"fingerprint": "b" * 64}, "hardware": {**before["hardware"], "usable_cores": 4}}  # type: ignore[dict-item]
    assert differences(before, after) == [
        "the two profiles differ in their data set: aaaaaaaaaaaa…, then bbbbbbbbbbbb…",
        "the two profiles differ in their number of cores: 2, then 4",
    ]


GOOD = {"format": "bce3s-profile", "version": 1, "rows": [row(1.0, 2.0).to_dict()]}


def test_a_profile_is_read_back_and_unknown_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**GOOD, "rows": [*GOOD["rows"], {"key": "of the future"}]}))  # type: ignore[misc]
    assert read_profile(path)[1] == [row(1.0, 2.0)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a profile"),
        ('{"format": "bce3s-profile", "version": 2}', "has profile version 2, this program reads version 1"),
        ('{"format": "bce3s-profile", "version": 1}', "is a damaged profile"),
        (json.dumps({**GOOD, "rows": [{"key": "loader", "measured": True}]}), "is a damaged profile"),
        (json.dumps({**GOOD, "rows": 3}), "is a damaged profile"),
        (json.dumps({**GOOD, "rows": []}), "holds no measured row"),
    ],
)
def test_an_unusable_file_is_one_sentence_with_its_path(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_profile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*absent\.json: No such file"):
        read_profile(tmp_path / "absent.json")
