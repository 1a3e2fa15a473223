"""Times work in repeats, several kinds of work in turns, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pipelines.types import UserError

# What a stage may fail with without ending the profile: the user's errors, a file, and torch's and DALI's own (out of memory, capture).
MEASURED_FAILURES = (UserError, RuntimeError, OSError)
_WARM_UP_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to measure: `repeats` samples of at least `seconds` each, and at least one unit of work."""

    repeats: int = 5
    seconds: float = 1.0


def _nothing() -> None:
    pass


def _ignore(elapsed_s: float) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One kind of work.

    Args:
        work: does one unit, a batch; returns its decoded images. May be asynchronous on the device.
        settle: brings queues to the state of steady work before each sample; not timed.
        finished: told the seconds of each sample.
        leave: ends what runs in the background, after each sample and after a failure; not timed.
    """

    work: Callable[[], int]
    settle: Callable[[], None] = _nothing
    finished: Callable[[float], None] = _ignore
    leave: Callable[[], None] = _nothing


def sample_in_turns(probes: Mapping[str, Probe], budget: Budget, device: torch.device) -> dict[str, tuple[float, ...] | str]:
    """Decoded images/s of every probe and repeat; for a probe that failed the reason, one line."""
    counts: dict[str, int] = {}
    rates: dict[str, list[float]] = {name: [] for name in probes}
    reasons: dict[str, str] = {}
    for turn in range(-1, budget.repeats):
        for name, probe in list(probes.items())[:: 1 if turn % 2 else -1]:
            if name in reasons:
                continue
            try:
                if turn < 0:
                    counts[name] = _units_per_sample(probe, budget, device)
                else:
                    rates[name].append(_timed(probe, counts[name], device))
            except MEASURED_FAILURES as error:
                reasons[name] = reason_of(error)
            finally:
                probe.leave()
    return {name: reasons.get(name) or tuple(rates[name]) for name in probes}


def sample(probe: Probe, budget: Budget, device: torch.device) -> tuple[float, ...] | str:
    """`sample_in_turns` of one probe."""
    return sample_in_turns({"only": probe}, budget, device)["only"]


def _units_per_sample(probe: Probe, budget: Budget, device: torch.device) -> int:
    """Warms up, and finds how many units fill a sample: asynchronous work cannot be stopped by a clock on the host."""
    probe.work()
    synchronize(device)
    probe.settle()
    started_s, done = time.perf_counter(), 0
    while not done or time.perf_counter() - started_s < budget.seconds * _WARM_UP_SHARE:
        probe.work()
        synchronize(device)
        done += 1
    return max(1, math.ceil(budget.seconds * done / (time.perf_counter() - started_s)))


def _timed(probe: Probe, count: int, device: torch.device) -> float:
    probe.settle()
    synchronize(device)
    started_s, images = time.perf_counter(), 0
    for _ in range(count):
        images += probe.work()
    synchronize(device)
    elapsed_s = time.perf_counter() - started_s
    probe.finished(elapsed_s)
    return images / elapsed_s


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reason_of(error: BaseException) -> str:
    """One line for the table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, torch.OutOfMemoryError):
        return "the device ran out of memory"
    return lines[0] if lines else type(error).__name__
