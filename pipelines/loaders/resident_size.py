"""What loader `resident` keeps of a split, how much memory that takes, and what would fit. Needs neither DALI nor a decoded image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipelines.config import DataConfig
from pipelines.format import ShardSplit
from pipelines.types import BackendError, IntArray

GIB = 1 << 30
# A GPU must also hold the network, its gradients and activations; a host the network, the page cache of the shards and other processes.
_SHARE_OF_DEVICE, _SHARE_OF_HOST = 0.75, 0.9


@dataclass(frozen=True, kw_only=True)
class KeptSizes:
    """Heights and widths of the kept images in pixels and their places in one buffer in bytes, int64 [N]; the buffer's bytes."""

    heights_N: IntArray
    widths_N: IntArray
    offsets_N: IntArray
    num_bytes: int


def kept_side(config: DataConfig) -> int:
    """The shorter side, in pixels, to which larger images are brought: the configured one, or what evaluation needs."""
    side = config.resident.min_side or round(config.image_size / config.augment.eval_crop)
    # A padded crop is drawn from images of exactly image_size, which `build_loader` asks for.
    return max(side, config.image_size) if config.augment.crop == "pad" else side


def kept_sizes(heights_N: IntArray, widths_N: IntArray, side: int) -> KeptSizes:
    """Sizes after the shorter side is brought to `side`, the longer one in proportion, rounded half up; no image is enlarged.

    Args:
        heights_N: int64 [N], of the stored images in pixels.
        widths_N: int64 [N], likewise.
        side: pixels.
    """
    shorter_N = np.minimum(heights_N, widths_N)
    scaled = [np.where(shorter_N > side, (2 * sizes_N * side + shorter_N) // (2 * shorter_N), sizes_N) for sizes_N in (heights_N, widths_N)]
    ends_N = np.cumsum(scaled[0] * scaled[1] * 3)
    num_bytes = int(ends_N[-1]) if len(ends_N) else 0
    return KeptSizes(heights_N=scaled[0], widths_N=scaled[1], offsets_N=ends_N - scaled[0] * scaled[1] * 3, num_bytes=num_bytes)


def resident_bytes(split: ShardSplit, config: DataConfig) -> int:
    """Bytes of memory that loader `resident` would keep `split` in."""
    return kept_sizes(split.heights_N, split.widths_N, kept_side(config)).num_bytes


def largest_side(split: ShardSplit, room: int, side: int) -> int:
    """The largest shorter side, at most `side`, with which `split` takes no more than `room` bytes; 0 if there is none."""
    low, high = 0, side
    while low < high:
        middle = (low + high + 1) // 2
        fits = kept_sizes(split.heights_N, split.widths_N, middle).num_bytes <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def require_host_room(split: ShardSplit, config: DataConfig, free: int) -> None:
    """Raises unless `split` fits in the part of `free` bytes of memory that may be taken.

    Raises:
        BackendError: it does not; says how much it needs, how much there is, and what would fit.
    """
    side, room = kept_side(config), int(free * _SHARE_OF_HOST)
    needed = resident_bytes(split, config)
    if needed <= room:
        return
    largest = largest_side(split, room, side)
    smaller = f"--set data.resident.min_side={largest}, which fits, or " if config.image_size <= largest < side else ""
    raise BackendError(
        f"loader 'resident' needs {needed / GIB:.1f} GiB for the {len(split)} images of '{split.name}' at shorter side {side}, "
        f"and {room / GIB:.1f} GiB of memory can be had for it; take {smaller}--loader dali"
    )


def fits_device(num_bytes: int, device: torch.device) -> bool:
    """Whether a CUDA device has `num_bytes` free, with enough left for the network."""
    return num_bytes <= torch.cuda.mem_get_info(device)[0] * _SHARE_OF_DEVICE


def largest_on_device(split: ShardSplit, device: torch.device, side: int) -> int:
    """The largest shorter side, at most `side`, with which `split` would fit on a CUDA device beside a network."""
    return largest_side(split, int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_DEVICE), side)


def free_host_bytes() -> int:
    """Memory this process can take without swapping: what the system has, or what its control group still allows if that is less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *_control_group_rooms()])


def _control_group_rooms() -> list[int]:
    """What memory limits of version 2 leave: page cache counts as free, because the kernel gives it up first."""
    rooms: list[int] = []
    try:
        path = next(line[3:] for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return rooms
    for folder in {Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup") / path.lstrip("/")}:
        try:
            limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
            pairs = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        except OSError:
            continue
        if limit != "max":
            cached = sum(int(number) for name, number in pairs if name in ("inactive_file", "active_file"))
            rooms.append(int(limit) - int(used) + cached)
    return rooms
