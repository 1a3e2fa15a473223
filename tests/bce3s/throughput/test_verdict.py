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
    streamed=False,
    resident_fits=False,
    fits_page_cache=True,
    stored_side=256.0,
    needed_side=256.0,
)
CPU = {"device": "cpu"}
RATES = {
    "storage.cold": 900.0,
    "storage.warm": 90_000.0,
    "read.dali": 80_000.0,
    "decode.one.region": 500.0,
    "decode.all.region": 3_000.0,
    "decode.gpu.0": 4_000.0,
    "decode.gpu.0.8": 6_000.0,
    "decode.gpu.own": 6_000.0,
    "loader": 5_000.0,
    "copy.pinned": 50_000.0,
    "step.contiguous": 1_000.0,
    "step.channels_last": 2_000.0,
    "together.discarded": 1_900.0,
    "together.real": 1_800.0,
}


def rows_of(**changes: float) -> list[Row]:
    """Rows with the medians of RATES; a double underscore in a name stands for the dot."""
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
    assert verdict.path == ("storage.warm", "read.dali", "decode.gpu.own", "loader", "step.channels_last")
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
        ({"fits_page_cache": False}, ["storage.cold", "read.dali", "decode.gpu.own", "loader", "step.channels_last"]),
        ({"device": "cpu", "crop": "pad"}, ["storage.warm", "read.dali", "loader", "step.channels_last"]),  # whole decode is not in RATES
        ({"step_key": "step.contiguous"}, ["storage.warm", "read.dali", "decode.gpu.own", "loader", "step.contiguous"]),
    ],
)
def test_only_rows_that_a_batch_of_this_run_passes_through_can_bind(change: dict[str, object], path: list[str]) -> None:
    assert [row.key for row in path_of(replace(FACTS, **change), rows_of())] == path  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "rates", "knob", "ceiling"),
    [
        (CPU, {"loader": 1500.0}, "more or faster cores, or a GPU to decode on", 2000.0),
        ({**CPU, "loader": "resident"}, {"loader": 1500.0}, "more or faster cores", 2000.0),
        ({}, {"loader": 1500.0}, "take a GPU that decodes faster", 2000.0),
        (
            {},
            {"decode__gpu__own": 1500.0, "decode__gpu__0": 1400.0, "decode__gpu__0__8": 1600.0},
            "--set data.dali.hw_decoder_load=0.8",
            2000.0,
        ),
        ({}, {"loader": 1500.0, "decode__gpu__0__8": 6200.0}, "take a GPU that decodes faster", 2000.0),  # not clearly better
        ({}, {"read__dali": 1500.0}, "more or faster cores", 2000.0),  # which hand the bytes over
        ({"resident_fits": True}, {"loader": 1500.0}, "--loader resident", 2000.0),
        ({"resident_fits": True, "loader": "resident"}, {"loader": 1500.0}, "take a faster GPU", None),
        ({"streamed": True, "loader": "webdataset"}, {"loader": 1500.0}, "copy the shards to a local disk and take --loader dali", 2000.0),
        ({"num_threads": 4}, {"loader": 1500.0}, "--set data.num_threads=0", 2000.0),
        ({"num_threads": 4}, {"loader": 1500.0, "read__dali": 1700.0}, "--set data.num_threads=0", 1700.0),
        ({**CPU, "num_threads": 16}, {"loader": 1500.0}, "more or faster cores", 2000.0),
        ({**CPU, "num_threads": 32}, {"loader": 1500.0}, "more or faster cores", 2000.0),
        ({"stored_side": 375.0}, {"loader": 1500.0}, "--min-side 256", 2000.0),
        ({**CPU, "stored_side": 300.0}, {"loader": 1500.0}, "more or faster cores", 2000.0),  # not larger by enough
        ({**CPU, "stored_side": 50.0, "needed_side": 37.0}, {"loader": 1500.0}, "more or faster cores", 2000.0),  # 64 would enlarge them
        ({"policy": "autoaugment-cifar10"}, {"loader": 1500.0}, "--set data.augment.policy=none", 2000.0),
        ({**CPU, "policy": "autoaugment-cifar10"}, {"decode__all__region": 1500.0}, "more or faster cores", 2000.0),
        ({"fits_page_cache": False}, {}, "a faster disk", 2000.0),
        ({"loader": "ffcv"}, {"copy__pinned": 500.0}, "--loader dali", 2000.0),
        ({"loader": "ffcv"}, {"loader": 500.0}, "--loader dali", 2000.0),
        ({**CPU, "loader": "ffcv"}, {"loader": 500.0}, "more or faster cores", 2000.0),
        ({}, {"step__compiled": 3000.0}, "--set compile=true", 3000.0),
        ({}, {"step__compiled": 8000.0}, "--set compile=true", 5000.0),  # then the loader binds
        ({"step_key": "step.contiguous"}, {"together__real": 990.0}, "--set channels_last=on", 2000.0),
        ({"precision": "fp32"}, {}, "--precision bf16", 5000.0),
        ({}, {}, "a faster step", 5000.0),
        ({"resident_fits": True}, {"together__real": 1200.0}, "--loader resident", 2000.0),  # what is missing is lost to contention
    ],
)
def test_the_change_that_helps_most_and_its_ceiling(
    facts: dict[str, object], rates: dict[str, float], knob: str, ceiling: float | None
) -> None:
    run, rows = replace(FACTS, **facts), rows_of(**rates)  # type: ignore[arg-type]
    advice = advise(run, rows, judged(run, rows))
    assert knob in advice.knob
    assert advice.ceiling == (None if ceiling is None else pytest.approx(ceiling))
    assert ":" not in advice.knob  # it stands behind a colon


def test_sentences_say_what_the_loader_must_deliver() -> None:
    rows = rows_of()
    verdict = judged(FACTS, rows)
    text = " ".join(verdict_sentences(FACTS, rows, verdict, advise(FACTS, rows, verdict)))
    for expected in (
        "Step (eager, channels-last) binds: 2,000 decoded images/s, 3,000 forward views/s.",
        "End to end: 1,800 decoded images/s, 2,700 forward views/s, 90% of that.",
        "the loader must deliver 2,000 decoded images/s; alone it delivers 5,000, 2.5 times that.",
        "contention: the step is 5% slower while the loader runs, within the noise",
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


def test_the_path_takes_the_runs_own_share_and_not_the_best() -> None:
    verdict = judged(FACTS, rows_of(decode__gpu__own=1_000.0))
    assert verdict.binding == "decode.gpu.own"
    assert verdict.efficiency == pytest.approx(1.8)


def sentences_of(facts: Facts, rows: list[Row]) -> str:
    verdict = judged(facts, rows)
    return " ".join(verdict_sentences(facts, rows, verdict, advise(facts, rows, verdict)))


def test_training_from_warm_pages_is_not_said_to_beat_the_cold_storage_it_will_read_from() -> None:
    facts, rows = replace(FACTS, fits_page_cache=False), rows_of()
    verdict = judged(facts, rows)
    assert (verdict.binding, verdict.efficiency, verdict.from_warm_pages) == ("storage.cold", None, True)
    text = sentences_of(facts, rows)
    assert "Storage (cold page cache) binds: 900 decoded images/s" in text
    assert "End to end: 1,800 decoded images/s, 2,700 forward views/s, but measured from warm pages" in text
    assert "% of that" not in text
    # A disk that is fast enough does not bind, and then the ratio stands.
    assert judged(facts, rows_of(**{"storage.cold": 9_000.0})).efficiency == pytest.approx(0.9)


def test_a_storage_row_from_cold_pages_bounds_no_run_whose_shards_fit_the_page_cache() -> None:
    assert "storage.cold" not in judged(FACTS, [row for row in rows_of() if row.key != "storage.warm"]).path


def test_contention_is_told_from_noise_and_a_loader_that_lags_is_named() -> None:
    def contention(beside: tuple[float, ...], **details: float) -> str:
        rows = [row for row in rows_of() if row.key not in ("step.channels_last", "together.discarded")]
        rows.append(Row(key="step.channels_last", rates=(1_990.0, 2_000.0, 2_010.0)))
        return sentences_of(FACTS, [*rows, Row(key="together.discarded", rates=beside, details=details)])

    assert "contention: the step is 5% slower while the loader runs;" in contention((1_890.0, 1_900.0, 1_910.0))
    assert "contention: the step is 5% slower while the loader runs, within the noise;" in contention((1_890.0, 1_900.0, 1_995.0))
    assert "while the loader runs, which delivers 0.43 batches a step meanwhile;" in contention((1_900.0,), batches_per_step=0.43)
    assert "contention: the step is no slower while the loader runs, within the noise;" in contention((1_995.0, 2_000.0))
    assert "meanwhile" not in contention((1_900.0,), batches_per_step=1.0)
    assert Row(key="together.discarded", rates=(1.0,), details={"batches_per_step": 0.43}).note == "pace 43%"


def test_a_loader_as_fast_as_the_step_delivers_about_as_much() -> None:
    text = sentences_of(FACTS, rows_of(loader=2_040.0))
    assert "alone it delivers 2,040, about as much." in text
    assert "1 times" not in text


def test_end_to_end_above_what_binds_is_noise() -> None:
    assert "as fast as that within the noise" in sentences_of(FACTS, rows_of(together__real=2_020.0))
