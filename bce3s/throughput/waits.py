"""How long the device stands still for data while a run trains: what the progress bar, the log and the profile show.

The host's clock misleads on CUDA: the host runs ahead of the device, so it may wait for a batch while the device is still busy, or have a
batch at once that the device is yet to decode. There a step counts as stalled for the time between two marks on the device's own clock: one
behind the work before, one behind whatever the batch waits for, the loader's own kernels on the training stream included. A device that
is still training when the batch is there passes both together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from pipelines.config import DataConfig
from pipelines.loaders import LoaderChoice

BatchT = TypeVar("BatchT")
READY_SHARE = 0.02  # a batch was ready if waiting for it cost less than this share of its step
BINDING_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Occupancy:
    """Waiting for data over some steps.

    Args:
        data_wait_share: of the elapsed time, 0…1, that the device stood still for data.
        ready_share: of the batches, 0…1, that were ready when they were asked for.
    """

    data_wait_share: float
    ready_share: float


@dataclass(frozen=True)
class Wait:
    """One wait for a batch: `wait_s` of the host, and on CUDA the events between which the device may have idled."""

    wait_s: float
    asked: torch.cuda.Event | None
    got: torch.cuda.Event | None

    @property
    def stall_s(self) -> float:
        """Seconds that the device stood still; to be asked for once the device has passed this point."""
        if self.asked is None or self.got is None:
            return self.wait_s
        return float(self.asked.elapsed_time(self.got)) / 1e3


def wait_for(batches: Iterator[BatchT], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> tuple[BatchT | None, Wait]:
    """The next batch, None at the end, and what waiting for it cost; never makes the host wait for `device`."""
    asked, asked_s = _mark(device), clock()
    batch = next(batches, None)
    wait_s = clock() - asked_s
    return batch, Wait(wait_s, asked, _mark(device))


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class DataWaits(Generic[BatchT]):
    """Iterates over batches and remembers what each wait for the next one cost; never makes the host wait for the device.

    Args:
        batches: to draw from.
        device: on which the steps run.
        clock: of the host, in seconds.
    """

    def __init__(self, batches: Iterator[BatchT], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        """Nothing is drawn yet."""
        self._batches, self._device, self._clock = batches, device, clock
        self._recent: list[tuple[Wait, float]] = []
        self._sums = _Sums()

    def __iter__(self) -> Iterator[BatchT]:
        """The batches; the time until the next one is asked for counts as the step's."""
        while True:
            asked_s = self._clock()
            batch, wait = wait_for(self._batches, self._device, self._clock)
            if batch is None:
                return
            yield batch
            self._recent.append((wait, self._clock() - asked_s))

    def recent(self) -> Occupancy:
        """Of the steps since the last call. To be called when the host has waited for the device anyway: all events have happened then."""
        sums = _Sums()
        for wait, elapsed_s in self._recent:
            sums.add(wait.stall_s, elapsed_s)
            self._sums.add(wait.stall_s, elapsed_s)
        self._recent = []
        return sums.occupancy()

    def total(self) -> Occupancy:
        """Of all steps; on the same condition as `recent`, which it includes."""
        self.recent()
        return self._sums.occupancy()


@dataclass
class _Sums:
    stall_s: float = 0.0
    elapsed_s: float = 0.0
    num_ready: int = 0
    num_steps: int = 0

    def add(self, stall_s: float, elapsed_s: float) -> None:
        self.stall_s += stall_s
        self.elapsed_s += elapsed_s
        self.num_ready += stall_s <= READY_SHARE * elapsed_s
        self.num_steps += 1

    def occupancy(self) -> Occupancy:
        if not self.num_steps:
            return Occupancy(data_wait_share=0.0, ready_share=1.0)
        return Occupancy(data_wait_share=self.stall_s / self.elapsed_s, ready_share=self.num_ready / self.num_steps)


def binding_sentence(occupancy: Occupancy, choice: LoaderChoice, config: DataConfig, stored_side: float) -> str | None:
    """One line with the knob to turn if data binds in an epoch; None if it does not.

    Args:
        occupancy: of the epoch.
        choice: the loader.
        config: its settings.
        stored_side: shorter side in pixels of the images in the shards, typically.
    """
    if occupancy.data_wait_share < BINDING_SHARE:
        return None
    return (
        f"data binds: {occupancy.data_wait_share:.0%} of the epoch went by waiting for loader '{choice.name}', "
        f"{occupancy.ready_share:.0%} of its batches were ready; {_knob(choice, config, stored_side)}; 'bce3s profile' measures every part"
    )


def _knob(choice: LoaderChoice, config: DataConfig, stored_side: float) -> str:
    num_cores, needed_side = len(os.sched_getaffinity(0)), round(config.image_size / config.augment.eval_crop)
    if choice.streamed:
        return "raise --set data.stream.buffer_bytes, or copy the shards to a local disk"
    if choice.name in ("resident", "cached", "synthetic"):
        return "nothing is decoded, so lighten the augmentation"
    if choice.resident_fits:
        return "take --loader resident, for the decoded set fits in memory"
    if 0 < config.num_threads < num_cores:
        return f"decode with all {num_cores} cores by --set data.num_threads=0"
    if stored_side > 1.25 * needed_side:
        return f"make shards of smaller images with make_shards.py --min-side {needed_side}"
    return "decoding needs more cores, or a GPU that decodes"
