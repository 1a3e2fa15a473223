"""Copies from the host to the device, of one decoded batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bce3s.throughput.rows import Row
from bce3s.throughput.timing import MEASURED_FAILURES, Budget, Probe, reason_of, sample_in_turns


def copy_rows(num_samples: int, image_size: int, device: torch.device, budget: Budget) -> Iterator[Row]:
    """The rows "copy.*"; needs CUDA. The batch is [num_samples, image_size, image_size, 3]."""
    shape = (num_samples, image_size, image_size, 3)
    try:
        batches = {
            "copy.pinned": torch.zeros(shape, dtype=torch.uint8, pin_memory=True),
            "copy.pageable": torch.zeros(shape, dtype=torch.uint8),
            "copy.float": torch.zeros(shape, dtype=torch.float32, pin_memory=True),
        }
        probes = {key: Probe(work=_copier(batch, torch.empty_like(batch, device=device))) for key, batch in batches.items()}
    except MEASURED_FAILURES as error:
        yield from (Row(key=key, reason=reason_of(error)) for key in ("copy.pinned", "copy.pageable", "copy.float"))
        return
    for key, outcome in sample_in_turns(probes, budget, device).items():
        if isinstance(outcome, str):
            yield Row(key=key, reason=outcome)
        else:
            row = Row(key=key, rates=outcome)
            yield Row(key=key, rates=outcome, details={"gb_per_s": row.median * batches[key].nbytes / num_samples / 1e9})


def _copier(host: Tensor, on_device: Tensor) -> Callable[[], int]:
    def copy() -> int:
        on_device.copy_(host, non_blocking=True)
        return len(host)

    return copy
