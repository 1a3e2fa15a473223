"""The training step taken apart: views, forward and loss, backward, optimizer; what it computes, and the peak it could reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from bce3s.step import TrainStep
from bce3s.throughput.rows import Row
from bce3s.throughput.timing import Budget, Probe, sample_in_turns, synchronize
from pipelines.types import Batch

ResultT = TypeVar("ResultT")
PARTS = ("views", "forward", "backward", "update")


def part_rows(step: TrainStep, batch: Batch, num_steps: int, budget: Budget) -> Iterator[Row]:
    """The rows "part.*": what each part alone would let through. The device is waited for after every part, which costs a little."""
    meter = _PartMeter(step, batch, num_steps)
    outcome = sample_in_turns({"step": Probe(work=meter.work, settle=meter.reset, finished=meter.finished)}, budget, step.placement.device)
    reason = outcome["step"] if isinstance(outcome["step"], str) else ""
    for name in PARTS:
        yield Row(key=f"part.{name}", rates=() if reason else tuple(meter.rates[name]), reason=reason)


class _PartMeter:
    """Runs steps and sums the seconds of each part."""

    def __init__(self, step: TrainStep, batch: Batch, num_steps: int) -> None:
        self._step, self._batch, self._num_steps = step, batch, num_steps
        self.rates: dict[str, list[float]] = {name: [] for name in PARTS}
        self.reset()

    def reset(self) -> None:
        self._seconds, self._images = dict.fromkeys(PARTS, 0.0), 0

    def work(self) -> int:
        step, batch = self._step, self._batch
        step.schedule(batch, self._num_steps)
        views = self._timed("views", lambda: step.views(batch))
        output = self._timed("forward", lambda: step.evaluate_loss(views, batch))
        self._timed("backward", lambda: step.backward(output.total))
        self._timed("update", step.update)
        self._images += len(batch.ids_S)
        return len(batch.ids_S)

    def _timed(self, name: str, part: Callable[[], ResultT]) -> ResultT:
        synchronize(self._step.placement.device)
        started_s = time.perf_counter()
        result = part()
        synchronize(self._step.placement.device)
        self._seconds[name] += time.perf_counter() - started_s
        return result

    def finished(self, elapsed_s: float) -> None:
        for name, seconds in self._seconds.items():
            self.rates[name].append(self._images / seconds)


def forward_flops(step: TrainStep, image_size: int) -> float:
    """Floating-point operations of one view's forward pass through the network, a multiplication and an addition counted as two."""
    model = step.model
    views = torch.zeros((1, 3, image_size, image_size), device=step.placement.device)
    was_training = model.training
    model.eval()  # one view has no batch statistics
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(views)
    model.train(was_training)
    return float(counter.get_total_flops())
