"""Whether a claimed difference is there: said with an interval, or said to be undecided; never asserted."""

from __future__ import annotations

from typing import Any

from bce3s.reproduce.statistics import Interval, paired_interval, welch_interval

CONFIDENCE = 0.95
_NO_SPREAD = 1e-9  # points: equal differences come out of floating point as not quite equal


def judge(better: dict[int, float], worse: dict[int, float]) -> dict[str, Any]:
    """The difference between two rows in one group, with a 95 % interval.

    Runs of one seed see the same order of images and the same augmentation, so where both rows have two seeds or more in common the
    differences within a seed are taken (Student's paired interval); else, with two runs each, the two means (Welch's).

    Args:
        better, worse: seed -> top-1 in percent of the row that is claimed to be above, and of the other.

    Returns:
        {"method", "n", "difference", "interval", "verdict"}: n is text; verdict is "holds" where the whole interval lies above 0,
        "against" where it lies below, else "not decided". Runs that do not differ at all give no spread, and so decide nothing.
    """
    common = sorted(better.keys() & worse.keys())
    interval: Interval | None = None
    if len(common) >= 2:
        method, n = "paired by seed", str(len(common))
        interval = paired_interval([better[seed] - worse[seed] for seed in common], CONFIDENCE)
    elif len(better) >= 2 and len(worse) >= 2:
        method, n = "Welch", f"{len(better)} and {len(worse)}"
        interval = welch_interval(list(better.values()), list(worse.values()), CONFIDENCE)
    else:
        method, n = "none", str(len(better)) if len(better) == len(worse) else f"{len(better)} and {len(worse)}"
    if interval is None:
        known = better and worse
        difference = sum(better.values()) / len(better) - sum(worse.values()) / len(worse) if known else None
        return {"method": method, "n": n, "difference": difference, "interval": None, "verdict": "not decided"}
    decided = interval.spread > _NO_SPREAD and (interval.low > 0 or interval.high < 0)
    verdict = "not decided" if not decided else "holds" if interval.low > 0 else "against"
    return {"method": method, "n": n, "difference": interval.difference, "interval": [interval.low, interval.high], "verdict": verdict}


def claim_sentence(claim: dict[str, Any]) -> str:
    """One judged claim as a person reads it."""
    head = f"{claim['better_title']} above {claim['worse_title']} ({claim['group']})"
    said = claim["published_difference"]
    published = "" if said is None else f"; published difference {said:+.2f}"
    if claim["empty"]:
        return f"{head}: n/a, no class is in this group{published}"
    if claim["interval"] is None:
        one = "" if claim["difference"] is None else f" (difference {claim['difference']:+.2f}, no interval)"
        return f"{head}: not decided at n = {claim['n']}{one}{published}"
    low, high = claim["interval"]
    verdict = f"{claim['verdict']} at n = {claim['n']}"
    interval = f"95 % interval of the difference {low:+.2f} to {high:+.2f}, mean {claim['difference']:+.2f}, {claim['method']}"
    return f"{head}: {verdict} ({interval}){published}"
