"""Student's t and the intervals made of it, against printed tables and cases by hand."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bce3s.reproduce.statistics import paired_interval, student_quantile, student_tail, welch_interval

# Two-sided 95 % and 99 % points, as every statistics book prints them.
PRINTED = [
    *((0.975, degrees, t) for degrees, t in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042))),
    *((0.995, degrees, t) for degrees, t in ((1, 63.657), (2, 9.925), (4, 4.604), (120, 2.617))),
    *((0.975, 120, 1.980), (0.95, 4, 2.132), (0.975, 1e7, 1.960)),
]


@pytest.mark.parametrize(("probability", "degrees", "t"), PRINTED)
def test_quantiles_as_printed(probability: float, degrees: float, t: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 7.0, 300.0])
def test_tails_where_they_are_known_in_closed_form(t: float) -> None:
    assert student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-9)  # Cauchy
    assert student_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-6)


@given(st.floats(0.3, 400), st.floats(0.51, 0.9995))
def test_a_quantile_has_its_tail(degrees: float, probability: float) -> None:
    assert student_tail(student_quantile(probability, degrees), degrees) == pytest.approx(1 - probability, rel=1e-6)


def test_paired_by_hand() -> None:
    # mean 2, s = 1, standard error 1/√3, t(2) = 4.3027
    interval = paired_interval([1.0, 2.0, 3.0])
    assert interval == pytest.approx((2.0, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3), 1 / math.sqrt(3)), abs=1e-4)


def test_welch_by_hand() -> None:
    # Variances 1 and 100, n = 3 each: the degrees of freedom are nearly those of the wide sample alone.
    first, second = [10.0, 11.0, 12.0], [0.0, 10.0, 20.0]
    interval = welch_interval(first, second)
    degrees = (1 / 3 + 100 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (100 / 3) ** 2 / 2)
    assert degrees == pytest.approx(2.04, abs=0.005)
    reach = student_quantile(0.975, degrees) * math.sqrt(101 / 3)
    assert interval == pytest.approx((1.0, 1 - reach, 1 + reach, math.sqrt(101 / 3)))
    assert welch_interval(second, first).low == pytest.approx(-interval.high)


def test_equal_variances_and_sizes_give_the_pooled_degrees() -> None:
    first, second = [1.0, 2.0, 3.0], [5.0, 6.0, 7.0]
    assert welch_interval(first, second).high == pytest.approx(-4 + student_quantile(0.975, 4) * math.sqrt(2 / 3))


def test_runs_without_spread_give_an_interval_without_width() -> None:
    assert welch_interval([1.0, 1.0], [2.0, 2.0]) == (-1.0, -1.0, -1.0, 0.0)
    assert paired_interval([0.5, 0.5]) == (0.5, 0.5, 0.5, 0.0)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    draws = [(rng.normal(3, 1, 3).tolist(), rng.normal(1, 1, 3).tolist()) for _ in range(1000)]
    for covered in (
        [paired_interval([a - b for a, b in zip(first, second, strict=True)]) for first, second in draws],
        [welch_interval(first, second) for first, second in draws],
    ):
        assert statistics.fmean(interval.low < 2 < interval.high for interval in covered) == pytest.approx(0.955, abs=0.025)
