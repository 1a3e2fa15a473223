"""Loader and step, each alone and both together, measured in turns: their ratios are the verdict."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from bce3s.step import TrainStep
from bce3s.throughput.timing import Probe, synchronize
from bce3s.throughput.waits import Wait, wait_for
from bce3s.throughput.workload import EndlessBatches
from pipelines.types import Batch


def loader_probe(batches: EndlessBatches, depth: int) -> Probe:
    """The loader alone; `depth` batches decoded ahead while something else was measured are taken out first."""

    def drain() -> None:
        for _ in range(depth):
            next(batches)

    return Probe(work=lambda: len(next(batches).ids_S), settle=drain)


def step_probe(step: TrainStep, batch: Batch, num_steps: int) -> Probe:
    """The step on a fixed batch; one step before each sample lets the loader's threads come to rest."""
    work = _stepper(step, batch, num_steps)
    return Probe(work=work, settle=lambda: _settle(work, step))


class Together:
    """End to end: every batch comes from the loader.

    Attributes:
        stall_shares: of each sample's time, the share for which the device stood still for data; counted as `DataWaits` counts it.
    """

    def __init__(self, batches: EndlessBatches, step: TrainStep, depth: int) -> None:
        """`depth` is how many batches the loader decodes ahead."""
        self._batches, self._step, self._depth = batches, step, depth
        self._waits: list[Wait] = []
        self.stall_shares: list[float] = []

    @property
    def probe(self) -> Probe:
        """What to measure."""
        return Probe(work=self._work, settle=self._steady, finished=self._finished)

    def _work(self) -> int:
        batch, wait = wait_for(self._batches, self._step.placement.device)
        assert batch is not None, "batches without end"
        self._waits.append(wait)
        self._step(batch, self._batches.num_steps)
        return len(batch.ids_S)

    def _steady(self) -> None:
        """A queue as in the middle of training: emptied of what came while others were measured, then refilled during one step."""
        for _ in range(self._depth):
            next(self._batches)
        self._work()
        synchronize(self._step.placement.device)
        self._waits = []

    def _finished(self, elapsed_s: float) -> None:
        self.stall_shares.append(sum(wait.stall_s for wait in self._waits) / elapsed_s)


class DiscardingReader:
    """A thread that draws a batch from the loader for every step taken, and throws it away.

    It may fall behind but not run ahead: the step is never made to wait, yet shares cores, memory and device with the loader.

    Args:
        batches: the loader's; nobody else may draw from them while a sample is running.
        device: that the loader delivers to.
    """

    def __init__(self, batches: EndlessBatches, device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._wanted = threading.Semaphore(0)
        self._stopped = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.num_drawn = self.num_steps = 0

    def want_one(self) -> None:
        """A step has begun.

        Raises:
            UserError: what the loader failed with.
        """
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._stopped = False
            self._thread = threading.Thread(target=self._draw, name="discarded batches")
            self._thread.start()
        self.num_steps += 1
        self._wanted.release()

    def _draw(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread
            while True:
                self._wanted.acquire()
                if self._stopped:
                    return
                next(self._batches)
                self.num_drawn += 1
        except BaseException as error:  # handed to the thread that measures
            self._failure = error

    def stop(self) -> None:
        """Waits for the batch being drawn, then gives the loader free."""
        if self._thread is not None:
            self._stopped = True
            self._wanted.release()
            self._thread.join()
            self._thread, self._wanted = None, threading.Semaphore(0)


def contention_probe(reader: DiscardingReader, step: TrainStep, batch: Batch, num_steps: int) -> Probe:
    """The step on a fixed batch while the loader runs and its output is discarded."""
    train = _stepper(step, batch, num_steps)

    def work() -> int:
        reader.want_one()
        return train()

    return Probe(work=work, settle=lambda: _settle(work, step), leave=reader.stop)


def _stepper(step: TrainStep, batch: Batch, num_steps: int) -> Callable[[], int]:
    def work() -> int:
        step(batch, num_steps)
        return len(batch.ids_S)

    return work


def _settle(work: Callable[[], int], step: TrainStep) -> None:
    work()
    synchronize(step.placement.device)
