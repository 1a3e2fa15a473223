"""Intervals for the difference of two means of a few runs, with Student's t.

Definitions: Student 1908 (paired differences), Welch 1947 (unequal variances); the t distribution's tail through the regularised
incomplete beta function, DLMF 8.17 (its continued fraction, 8.17.22).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

_PRECISION = 1e-15
_MOST_TERMS = 100_000


class Interval(NamedTuple):
    """A two-sided confidence interval of a difference of means, in the unit of the values; `spread` is the standard error."""

    difference: float
    low: float
    high: float
    spread: float


def student_tail(t: float, degrees: float) -> float:
    """P(T > t) for t ≥ 0 of Student's t with `degrees` > 0 degrees of freedom, which need not be whole."""
    return 0.5 * _regularized_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


@functools.cache
def student_quantile(probability: float, degrees: float) -> float:
    """The t below which Student's t with `degrees` > 0 degrees of freedom lies with `probability` in [0.5, 1)."""
    assert 0.5 <= probability < 1, "the upper half alone is asked for"
    assert degrees > 0, "there is no spread without a degree of freedom"
    low, high = 0.0, 1.0
    while student_tail(high, degrees) > 1 - probability:
        high *= 2
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if student_tail(middle, degrees) > 1 - probability else (low, middle)
    return (low + high) / 2


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> Interval:
    """Of the mean of at least two differences between runs that share a seed; n − 1 degrees of freedom."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return _interval(statistics.fmean(differences), spread, len(differences) - 1, confidence)


def welch_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Of mean(first) − mean(second), independent runs, at least two each; Welch–Satterthwaite degrees of freedom."""
    shares = [statistics.variance(values) / len(values) for values in (first, second)]
    difference = statistics.fmean(first) - statistics.fmean(second)
    if not sum(shares):
        return Interval(difference, difference, difference, 0.0)
    degrees = sum(shares) ** 2 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, (first, second), strict=True))
    return _interval(difference, math.sqrt(sum(shares)), degrees, confidence)


def _interval(difference: float, spread: float, degrees: float, confidence: float) -> Interval:
    reach = student_quantile((1 + confidence) / 2, degrees) * spread
    return Interval(difference, difference - reach, difference + reach, spread)


def _regularized_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b) for x in [0, 1], a and b > 0."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # beyond it the fraction converges slowly, and the other end's does not
        return 1 - _regularized_beta(1 - x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) / (a * _continued_fraction(x, a, b))


def _continued_fraction(x: float, a: float, b: float) -> float:
    """1 + d1·x/(1 + d2·x/(1 + …)) of DLMF 8.17.22, from the front (Lentz 1976), until a term changes nothing."""
    value, upper, lower = 1.0, 1.0, 0.0
    for term in range(1, _MOST_TERMS):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1.0 / (1.0 + d * x * lower)
        upper = 1.0 + d * x / upper
        value *= upper * lower
        if abs(upper * lower - 1.0) < _PRECISION:
            break
    return value
