"""Rows keep their samples, turn them into both units, and survive JSON; timing fills them."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
import torch

from bce3s.throughput.rows import NAMES, NEEDS_CUDA, SECTIONS, Row, complete, row_from_dict
from bce3s.throughput.timing import Budget, Probe, sample, sample_in_turns
from pipelines.types import ConfigError

CPU = torch.device("cpu")


def test_a_row_gives_median_and_range_in_both_units() -> None:
    row = Row(key="loader", rates=(100.0, 300.0, 200.0, 120.0, 1000.0), details={"gb_per_s": 1.5})
    values = row.to_dict()
    assert (values["decoded_images_per_s"]["median"], values["decoded_images_per_s"]["min"]) == (200.0, 100.0)
    assert values["decoded_images_per_s"]["samples"] == [100.0, 300.0, 200.0, 120.0, 1000.0]
    # Two decoded images are three forward views.
    assert values["forward_views_per_s"] == {"median": 300.0, "min": 150.0, "max": 1500.0}
    assert row_from_dict(json.loads(json.dumps(values))) == row


def test_a_row_that_was_not_measured_says_why_and_survives_json() -> None:
    row = Row(key="step.graph", reason=NEEDS_CUDA)
    assert row.to_dict()["text"] == "not measured: needs a CUDA device"
    assert row_from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_the_table_is_complete_and_in_order_whatever_was_measured() -> None:
    rows = complete([Row(key="together.real", rates=(1.0,)), Row(key="storage.cold", rates=(2.0,))], "asleep")
    assert [row.key for row in rows] == list(NAMES)
    assert [row.key for row in rows if row.rates] == ["storage.cold", "together.real"]
    assert {row.reason for row in rows if not row.rates} == {"asleep"}
    assert {key.partition(".")[0] for key in NAMES} == set(SECTIONS)


@pytest.mark.parametrize("rates", [[], [5.0, 0.0], [5.0, "fast"], None])
def test_damaged_samples_are_refused(rates: Any) -> None:
    values = {"key": "loader", "measured": True, "decoded_images_per_s": {"samples": rates}, "details": {}}
    with pytest.raises((ValueError, TypeError, AssertionError)):
        row_from_dict(values)


def test_work_is_counted_in_images_over_time() -> None:
    def work() -> int:
        time.sleep(0.004)
        return 10

    rates = sample(Probe(work=work), Budget(repeats=5, seconds=0.02), CPU)
    assert isinstance(rates, tuple)
    assert len(rates) == 5
    # Sleeping takes no less than asked for; how much longer is up to the machine.
    assert all(rate <= 2500 for rate in rates)
    assert max(rates) > 250


def test_probes_take_turns_settle_before_and_leave_after_every_sample() -> None:
    calls: list[str] = []

    def probe(name: str) -> Probe:
        def work() -> int:
            calls.append(name)
            time.sleep(0.001)
            return 1

        return Probe(work=work, settle=lambda: calls.append(f"settle {name}"), leave=lambda: calls.append(f"leave {name}"))

    sample_in_turns({"a": probe("a"), "b": probe("b")}, Budget(repeats=6, seconds=0.001), CPU)
    order = [call.removeprefix("leave ") for call in calls if call.startswith("leave")]
    assert sorted(order) == ["a"] * 7 + ["b"] * 7  # the warm-up and six samples
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 14, 2))  # in turns
    assert {order[i] for i in range(0, 14, 2)} == {"a", "b"}  # neither always first
    for before, call in pairwise(calls):
        if call.startswith("settle"):
            assert before == call.removeprefix("settle ") or before.startswith("leave")


def test_work_that_fails_gives_its_reason_and_the_others_go_on() -> None:
    left = []

    def fail() -> int:
        raise ConfigError("no such thing\nsecond line")

    probes = {"bad": Probe(work=fail, leave=lambda: left.append("bad")), "good": Probe(work=lambda: 1)}
    outcomes = sample_in_turns(probes, Budget(repeats=5, seconds=0.001), CPU)
    assert outcomes["bad"] == "no such thing"
    assert len(outcomes["good"]) == 5
    assert left == ["bad"]


def test_a_mistake_in_the_program_is_not_taken_for_a_row_that_failed() -> None:
    def broken() -> int:
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        sample(Probe(work=broken), Budget(), CPU)
