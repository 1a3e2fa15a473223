"""The verdict on made-up rows, every figure computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bce3s.throughput.advice import advise, verdict_sentences
from bce3s.throughput.rows import Row
from bce3s.throughput.verdict import Facts, Verdict, judge, path_of

FACTS = Facts(
    loader="dali",
    device="cuda",
    step_key="step.channels_last",
    crop="resized",
    policy="none",
    precision="bf16",
    num_threads=0,
    num_cores=16,
    resident_fits=False,
    fits_page_cache=True,
    stored_side=256.0,
    needed_side=256.0,
)
RATES = {
    "storage.cold": 900.0,
    "storage.warm": 90_000.0,
    "read.dali": 80_000.0,
    "decode.one.region": 500.0,
    "decode.all.region": 3_000.0,
    "decode.gpu.0": 4_000.0,
    "decode.gpu.0.8": 6_000.0,
    "loader": 5_000.0,
    "copy.pinned": 50_000.0,
    "step.contiguous": 1_000.0,
    "step.channels_last": 2_000.0,
    "together.discarded": 1_900.0,
    "together.real": 1_800.0,
}


def rows_of(**changes: float) -> list[Row]:
    """Rows with the medians of RATES; a double underscore in a name stands for the dot, None leaves the row out."""
    rates = {**RATES, **{key.replace("__", "."): rate for key, rate in changes.items()}}
    stall = {"together.real": {"stall_share": 0.02}}
    return [
        Row(key=key, rates=tuple(rate * factor for factor in (0.9, 0.95, 1.0, 1.05, 1.3)), details=stall.get(key, {}))
        for key, rate in rates.items()
    ]


def judged(facts: Facts, rows: list[Row]) -> Verdict:
    verdict = judge(facts, rows)
    assert verdict is not None
    return verdict


def test_figures_of_a_run_that_the_step_binds() -> None:
    verdict = judged(FACTS, rows_of())
    assert verdict.path == ("storage.warm", "read.dali", "decode.gpu.0.8", "loader", "step.channels_last")
    assert verdict.binding == "step.channels_last"
    assert verdict.efficiency == pytest.approx(0.9)  # 1800 / 2000
    assert verdict.loader_headroom == pytest.approx(5000 / 1800)
    assert verdict.contention_loss == pytest.approx(0.05)  # 1 − 1900 / 2000
    assert verdict.stall_share == 0.02
    assert verdict.required == pytest.approx(2000)  # decoded images/s, which are 3000 forward views/s
    assert verdict.to_dict()["required_views_per_s"] == pytest.approx(3000)
    assert verdict.turns is None


def test_on_a_cpu_decode_is_the_hosts_and_the_cores_are_shared() -> None:
    verdict = judged(replace(FACTS, device="cpu"), rows_of())
    assert "decode.all.region" in verdict.path
    assert verdict.turns == pytest.approx(1 / (1 / 5000 + 1 / 2000))


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"loader": "resident"}, ["loader", "step.channels_last"]),
        ({"loader": "ffcv"}, ["copy.pinned", "loader", "step.channels_last"]),
        ({"fits_page_cache": False}, ["storage.cold", "read.dali", "decode.gpu.0.8", "loader", "step.channels_last"]),
        ({"device": "cpu", "crop": "pad"}, ["storage.warm", "read.dali", "loader", "step.channels_last"]),  # whole decode is not in RATES
        ({"step_key": "step.contiguous"}, ["storage.warm", "read.dali", "decode.gpu.0.8", "loader", "step.contiguous"]),
    ],
)
def test_only_rows_that_a_batch_of_this_run_passes_through_can_bind(change: dict[str, object], path: list[str]) -> None:
    assert [row.key for row in path_of(replace(FACTS, **change), rows_of())] == path  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "rates", "knob", "ceiling"),
    [
        ({}, {"loader": 1500.0}, "more or faster cores", 2000.0),
        ({"resident_fits": True}, {"loader": 1500.0}, "--loader resident", 2000.0),
        ({"resident_fits": True, "loader": "resident"}, {"loader": 1500.0}, "more or faster cores", 2000.0),
        ({"num_threads": 4}, {"loader": 1500.0}, "--set data.num_threads=0", 2000.0),
        ({"num_threads": 4}, {"loader": 1500.0, "read__dali": 1700.0}, "--set data.num_threads=0", 1700.0),
        ({"stored_side": 375.0}, {"loader": 1500.0}, "--min-side 256", 2000.0),
        ({"policy": "autoaugment-cifar10"}, {"loader": 1500.0}, "--set data.augment.policy=none", 2000.0),
        ({"fits_page_cache": False}, {}, "a faster disk", 2000.0),
        ({"loader": "ffcv"}, {"copy__pinned": 500.0}, "--loader dali", 2000.0),
        ({}, {"step__compiled": 3000.0}, "--set compile=true", 3000.0),
        ({}, {"step__compiled": 8000.0}, "--set compile=true", 5000.0),  # then the loader binds
        ({"step_key": "step.contiguous"}, {"together__real": 990.0}, "--set channels_last=on", 2000.0),
        ({"precision": "fp32"}, {}, "--precision bf16", 5000.0),
        ({}, {}, "only a faster step helps", 5000.0),
        ({"resident_fits": True}, {"together__real": 1200.0}, "--loader resident", 2000.0),  # what is missing is lost to contention
    ],
)
def test_the_change_that_helps_most_and_its_ceiling(facts: dict[str, object], rates: dict[str, float], knob: str, ceiling: float) -> None:
    run, rows = replace(FACTS, **facts), rows_of(**rates)  # type: ignore[arg-type]
    advice = advise(run, rows, judged(run, rows))
    assert knob in advice.knob
    assert advice.ceiling == pytest.approx(ceiling)


def test_sentences_say_what_the_loader_must_deliver() -> None:
    rows = rows_of()
    verdict = judged(FACTS, rows)
    text = " ".join(verdict_sentences(FACTS, rows, verdict, advise(FACTS, rows, verdict)))
    for expected in (
        "Step (eager, channels-last) binds: 2,000 decoded images/s, 3,000 forward views/s.",
        "End to end: 1,800 decoded images/s, 2,700 forward views/s, 90% of that.",
        "the loader must deliver 2,000 decoded images/s; alone it delivers 5,000, 2.5 times that.",
        "the step is 5% slower while the loader runs",
        "2% of training time waits for data",
    ):
        assert expected in text


def test_without_loader_or_step_there_is_no_verdict() -> None:
    assert judge(FACTS, [row for row in rows_of() if row.key != "loader"]) is None
    assert judge(FACTS, [row for row in rows_of() if row.key != "step.channels_last"]) is None


def test_a_missing_end_to_end_row_leaves_its_ratios_open() -> None:
    rows = [row for row in rows_of() if not row.key.startswith("together")]
    verdict = judged(FACTS, rows)
    assert (verdict.efficiency, verdict.loader_headroom, verdict.contention_loss, verdict.stall_share) == (None, None, None, None)
    assert len(verdict_sentences(FACTS, rows, verdict, advise(FACTS, rows, verdict))) == 3
