"""States as they were at one moment, in host memory: later updates of the same tensors do not reach them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bce3s.checkpoint.tree import Parts

_UINT_OF: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_CHUNK_BYTES = 1 << 20  # what `_all_finite` looks at in one go: small enough for a core's cache


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a snapshot's bytes: `start` … `stop`−1, its values in row-major order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Snapshot:
    """One state, taken.

    Args:
        parts: the state's values; its tensors may have gone on since.
        places: name -> where the tensor lies in `data`. Widest types first and no gaps, so that each is aligned to its own width.
        data: uint8 [bytes], host memory.
        events: what the copies on the GPUs record when they are done.
    """

    parts: Parts
    places: dict[str, Place]
    data: torch.Tensor
    events: tuple[torch.cuda.Event, ...]

    def wait(self) -> None:
        """Until the bytes have arrived; other Python threads run meanwhile."""
        for event in self.events:
            event.synchronize()

    def first_not_finite(self) -> str | None:
        """The first value that is NaN or infinite, a float or a tensor with such an element; None where all are finite."""
        if self.parts.odd_floats:
            return self.parts.odd_floats[0]
        for name in self.parts.tensors:
            place = self.places[name]
            if place.dtype.is_floating_point and not _all_finite(self.data[place.start : place.stop].numpy(), place.dtype):
                return name
        return None


class Staging:
    """Host memory that snapshots are copied into, kept for the next ones: fresh pages would cost more than the copying.

    Snapshots of one `take` are good until the next `take`.

    Args:
        pinned: lock the memory where tensors come from a GPU, so that its copies need no waiting host; worth it only for reuse.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._data = torch.empty(0, dtype=torch.uint8)

    def take(self, states: Sequence[Parts]) -> list[Snapshot]:
        """Copies the tensors of every state.

        CPU tensors are copied when this returns. CUDA tensors are copied by their device's current stream, without waiting for it here:
        what that stream is given afterwards runs behind the copies, so no update can overtake them. (A second stream would have to be
        waited for just as long, unless the state were cloned on the device first, which needs its memory twice.)
        """
        layouts = []
        stop = 0
        for parts in states:
            start = -(-stop // 64) * 64
            places, length = _lay_out(parts.tensors)
            layouts.append((parts, places, start, length))
            stop = start + length
        devices = {tensor.device for parts in states for tensor in parts.tensors.values() if tensor.is_cuda}
        self._reserve(stop, pinned=self._pinned and bool(devices))
        for parts, places, start, length in layouts:
            data = self._data[start : start + length]
            for name, place in places.items():
                target = data[place.start : place.stop].view(place.dtype).view(place.shape)
                target.copy_(parts.tensors[name], non_blocking=True)
        events = tuple(torch.cuda.current_stream(device).record_event() for device in devices)
        return [Snapshot(parts, places, self._data[start : start + length], events) for parts, places, start, length in layouts]

    def free(self) -> None:
        """Gives the memory back."""
        self._data = torch.empty(0, dtype=torch.uint8)

    def _reserve(self, num_bytes: int, *, pinned: bool) -> None:
        if self._data.numel() < num_bytes or (pinned and not self._data.is_pinned()):
            self.free()  # before the larger one is taken
            self._data = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)


def _lay_out(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Place], int]:
    places = {}
    stop = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        places[name] = Place(tensor.dtype, tuple(tensor.shape), start, stop)
    return places, stop


def _all_finite(data: NDArray[np.uint8], dtype: torch.dtype) -> bool:
    """Whether no element's exponent is all ones, which NaN and ±inf share in every IEEE layout, bfloat16 included.

    NumPy and not torch: it works on one core beside the training, where torch would wake its pool of threads for every tensor.
    """
    uint = _UINT_OF[dtype.itemsize]
    bits = data.view(uint)
    magnitude = uint((1 << (8 * dtype.itemsize - 1)) - 1)  # all but the sign
    infinity = torch.tensor([torch.inf], dtype=dtype).view(torch.uint8).numpy().view(uint)[0]
    chunk = _CHUNK_BYTES // dtype.itemsize
    return all(bool(((bits[i : i + chunk] & magnitude).max()) < infinity) for i in range(0, len(bits), chunk))
