"""A claim is said to hold, to be spoken against, or to be undecided: by its interval alone."""

from __future__ import annotations

from typing import Any

import pytest

from bce3s.reproduce.claims import claim_sentence, judge


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        (by_seed(50.0, 52.0, 54.0), by_seed(48.0, 50.1, 51.9), "holds"),
        (by_seed(48.0, 50.1, 51.9), by_seed(50.0, 52.0, 54.0), "against"),
        (by_seed(50.0, 52.0, 54.0), by_seed(54.0, 50.0, 51.0), "not decided"),
        (by_seed(50.0), by_seed(10.0), "not decided"),  # n = 1 decides nothing, however far apart
        ({}, by_seed(10.0, 11.0), "not decided"),
        (by_seed(50.0, 50.0), by_seed(40.0, 40.0), "not decided"),  # no spread at all is no estimate of one
        (by_seed(27.85, 27.9), by_seed(29.0, 29.05), "not decided"),  # nor is one that floating point made
    ],
)
def test_verdicts(better: dict[int, float], worse: dict[int, float], verdict: str) -> None:
    assert judge(better, worse)["verdict"] == verdict


def test_seeds_in_common_are_paired_and_else_welch_takes_over() -> None:
    # The seeds differ far more than the rows do: only the pairs show it.
    better, worse = by_seed(40.0, 50.0, 60.0), by_seed(39.0, 48.9, 59.1)
    paired = judge(better, worse)
    assert (paired["method"], paired["n"], paired["verdict"]) == ("paired by seed", "3", "holds")
    apart = judge(better, {seed + 10: value for seed, value in worse.items()})
    assert (apart["method"], apart["n"], apart["verdict"]) == ("Welch", "3 and 3", "not decided")
    assert apart["difference"] == pytest.approx(paired["difference"])
    # Seed 9 has no partner and does not count.
    assert judge({**better, 9: 0.0}, worse) == paired


def claim(**changes: Any) -> dict[str, Any]:
    named = {"better_title": "BCE", "worse_title": "CE", "group": "few", "published_difference": 1.73, "empty": False}
    return {**named, **judge(by_seed(50.0, 52.0, 54.0), by_seed(48.0, 50.1, 51.9)), **changes}


def test_sentences() -> None:
    said = claim_sentence(claim())
    assert said.startswith("BCE above CE (few): holds at n = 3 (95 % interval of the difference +1.75 to +2.25, mean +2.00, paired")
    assert said.endswith("published difference +1.73")
    assert "published" not in claim_sentence(claim(published_difference=None))
    assert claim_sentence(claim(**judge({}, {}))).startswith("BCE above CE (few): not decided at n = 0;")
    assert "not decided at n = 1 (difference +40.00, no interval)" in claim_sentence(claim(**judge(by_seed(50.0), by_seed(10.0))))
    assert claim_sentence(claim(empty=True)).startswith("BCE above CE (few): n/a, no class is in this group")
