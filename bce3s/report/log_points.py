"""The lines of a run's log as points to draw, few enough for a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bce3s.report.findings import MEASURES, EpochPoint, StepPoint
from bce3s.runlog import loss_terms

MAX_POINTS = 1000
_RATES = ("images_per_s", "views_per_s", "data_wait_share")

Line = dict[str, Any]


def epoch_points(lines: Sequence[Line]) -> tuple[EpochPoint, ...]:
    """Of the lines of `bce3s.runlog.read_metrics`; epochs as a person counts them."""
    return tuple(
        EpochPoint(
            epoch=line["epoch"] + 1,
            split=str(line.get("split", "")),
            accuracies={name: line[name] for name in MEASURES if name in line},
            terms=loss_terms(line),
            images_per_s=line["images_per_s"],
            data_wait_share=line["data_wait_share"],
            train_s=line["train_s"],
        )
        for line in lines
        if line["kind"] == "epoch"
    )


def step_points(lines: Sequence[Line], images_a_step: int, num_images: int) -> tuple[StepPoint, ...]:
    """Of the lines of `bce3s.runlog.read_metrics`; several lines become one point where there are more than 1,000.

    Args:
        lines: oldest first.
        images_a_step: source images of all ranks.
        num_images: of the train split, 0 if it is not known.
    """
    steps = [line for line in lines if line["kind"] == "step"]
    num_steps = _num_steps(lines, images_a_step, num_images)
    size = math.ceil(len(steps) / MAX_POINTS) or 1
    return tuple(_point(steps[start : start + size], num_steps) for start in range(0, len(steps), size))


def _point(lines: list[Line], num_steps: int) -> StepPoint:
    """Lines stand for equally many images, so a mean over time weighs each by the time it took."""
    last = lines[-1]
    terms = [loss_terms(line) for line in lines]
    seconds = [1.0 / line["images_per_s"] if line["images_per_s"] else 0.0 for line in lines]
    rates = {name: _weighted([line.get(name) for line in lines], seconds) for name in _RATES}
    memory = [line["device_memory_bytes"] for line in lines if line.get("device_memory_bytes") is not None]
    return StepPoint(
        epoch=last["epoch"] + (last["step"] + 1) / last.get("num_steps", num_steps),
        terms={name: statistics.fmean(each[name] for each in terms if name in each) for name in dict.fromkeys(n for t in terms for n in t)},
        images_per_s=rates["images_per_s"] or 0.0,
        views_per_s=rates["views_per_s"],
        data_wait_share=rates["data_wait_share"] or 0.0,
        device_memory_bytes=max(memory, default=None),
    )


def _weighted(values: list[float | None], weights: list[float]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _num_steps(lines: Sequence[Line], images_a_step: int, num_images: int) -> int:
    """Steps of an epoch, for logs whose lines do not say: of an epoch that is done, of the train split, or what is there at least."""
    seen = max((line["step"] + 1 for line in lines if line["kind"] == "step"), default=1)
    done = [line["images_per_s"] * line["train_s"] for line in lines if line["kind"] == "epoch"]
    images = max(done, default=float(num_images))
    return max(seen, math.ceil(images / images_a_step - 1e-6))
