"""How full and how busy the run's GPU is; asked without waiting for it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from bce3s.progress.standing import Standing

_EVERY_S = 1.0


class DeviceLoad:
    """Keeps the device figures of a `Standing` up to date, from the thread that draws it. Knows nothing of a CPU."""

    def __init__(self, device: torch.device | None) -> None:
        """Of `device`; None for nothing."""
        self._device = device if device is not None and device.type == "cuda" else None
        self._asked_s, self._tells_busy = 0.0, True

    def update(self, standing: Standing) -> None:
        """At most once a second: memory that the allocator holds, and utilisation where nvidia-ml-py is installed."""
        now_s = time.monotonic()
        if self._device is None or now_s - self._asked_s < _EVERY_S:
            return
        self._asked_s = now_s
        import torch

        standing.device_memory_bytes = torch.cuda.memory_reserved(self._device)
        if self._tells_busy:
            self._tells_busy = False
            # Not installed, no permission, no such query on this device: then the dashboard goes without.
            with contextlib.suppress(Exception):
                standing.device_busy_percent = torch.cuda.utilization(self._device)
                self._tells_busy = True


def memory_bytes(device: torch.device) -> dict[str, int]:
    """For a log line: what the allocator holds of a CUDA device; nothing of a CPU. Does not wait for the device."""
    import torch

    return {"device_memory_bytes": torch.cuda.memory_reserved(device)} if device.type == "cuda" else {}


def total_memory_bytes(device: torch.device) -> int | None:
    """Of a CUDA device; None of a CPU."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
