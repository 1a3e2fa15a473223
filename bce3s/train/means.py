"""The loss terms of an epoch, summed on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bce3s.distributed import ALONE, World


class TermMeans:
    """Sums the loss terms of one epoch on the device; the host reads them once per log line, never per step.

    It also remembers, on the device, the first step whose total was not finite. `state` and `load_state` carry it over a kill.
    """

    def __init__(self, world: World = ALONE) -> None:
        """Empty."""
        self._world = world
        self._names: list[str] = []
        self._sums_2T = torch.zeros(0)  # since the last read, and over the epoch
        self._num_recent = self._num_all = 0
        self._first_broken = torch.zeros(0, dtype=torch.int64)

    def add(self, terms: dict[str, Tensor], step: int) -> None:
        """Adds one step's terms, float32 [] each, "total" among them, under the same names all epoch."""
        stacked_T = torch.stack(list(terms.values()))
        if not self._num_all:
            self._names, self._sums_2T = list(terms), torch.zeros_like(stacked_T).repeat(2, 1)
        if not len(self._first_broken):
            self._first_broken = torch.full((1,), -1, dtype=torch.int64, device=stacked_T.device)
        self._sums_2T += stacked_T
        self._first_broken = torch.where((self._first_broken < 0) & ~terms["total"].isfinite(), step, self._first_broken)
        self._num_recent += 1
        self._num_all += 1

    def recent(self) -> dict[str, float]:
        """The means since the last call, over all ranks, which must call this together; waits for the device once."""
        values = self._read(self._sums_2T[0] / self._num_recent)
        self._sums_2T[0] = 0
        self._num_recent = 0
        return values

    def epoch(self) -> dict[str, float]:
        """The means of all steps, over all ranks, which must call this together; waits for the device once."""
        return self._read(self._sums_2T[1] / self._num_all)

    def first_broken_step(self) -> int | None:
        """The first step of which the total was not finite on some rank, which must call this together; waits for the device."""
        if not len(self._first_broken):
            return None
        broken_W = self._world.gather_rows(self._first_broken).tolist()
        return min((step for step in broken_W if step >= 0), default=None)

    def _read(self, means_T: Tensor) -> dict[str, float]:
        return dict(zip(self._names, self._world.mean(means_T).tolist(), strict=True))

    def clear(self) -> None:
        """Begins another epoch."""
        self._num_recent = self._num_all = 0
        self._names, self._sums_2T = [], torch.zeros(0)

    def state(self) -> dict[str, Any]:
        """What `load_state` takes; its tensors change with the next `add`."""
        return {"names": list(self._names), "sums": self._sums_2T, "num_recent": self._num_recent, "num_all": self._num_all}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Continues an epoch."""
        self._names, self._sums_2T = list(state["names"]), state["sums"].to(device)
        self._num_recent, self._num_all = state["num_recent"], state["num_all"]


def all_finite(values: dict[str, float]) -> bool:
    """Whether no mean is infinite or not a number."""
    return all(math.isfinite(value) for value in values.values())
