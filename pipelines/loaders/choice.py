"""Which loader `auto` means, by where the shards are, how large the set is decoded, and what memory there is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from pipelines.config import DataConfig
from pipelines.format import ShardSet
from pipelines.types import SPLITS, IntArray

# The network, its gradients and activations need the rest of a GPU; on a host, so do the page cache and other processes.
_SHARE_OF_DEVICE, _SHARE_OF_HOST = 0.5, 0.5
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class LoaderChoice:
    """A resolved loader.

    Args:
        name: of `LOADERS`.
        reason: why, in a few words for people.
        resident_fits: whether loader `resident` would have room for all splits.
    """

    name: str
    reason: str
    resident_fits: bool


def choose_loader(config: DataConfig, shards: ShardSet, device: torch.device) -> LoaderChoice:
    """Resolves `config.loader`, a name of `LOADERS` or "auto".

    Streamed shards can only be streamed. A decoded set that fits is kept: nothing is faster. Else DALI decodes, on the GPU where there is
    one; where DALI is missing FFCV does, if the shards have betons.
    """
    if is_streamed(shards):
        return LoaderChoice(name="webdataset" if config.loader == "auto" else config.loader, reason="shards at a URL", resident_fits=False)
    needed, room = decoded_bytes(shards, config), free_bytes(device)
    fits = needed <= room * (_SHARE_OF_DEVICE if device.type == "cuda" else _SHARE_OF_HOST)
    if config.loader != "auto":
        return LoaderChoice(name=config.loader, reason="asked for", resident_fits=fits)
    size = f"decoded, the set has {needed / _GIB:.1f} GiB" if needed >= _GIB / 10 else f"decoded, the set has {needed / (1 << 20):.0f} MiB"
    free = f"of {room / _GIB:.0f} GiB free on {'the host' if device.type == 'cpu' else device}"
    if fits:
        return LoaderChoice(name="resident", reason=f"{size}, {free}", resident_fits=True)
    if find_spec("nvidia.dali") is None and find_spec("ffcv") is not None and "beton" in shards.manifest["splits"]["train"]:
        return LoaderChoice(name="ffcv", reason=f"{size}, too much {free}; DALI is not installed", resident_fits=False)
    return LoaderChoice(name="dali", reason=f"{size}, too much {free}", resident_fits=False)


def is_streamed(shards: ShardSet) -> bool:
    """Whether the shards lie where they cannot be mapped into memory."""
    return not isinstance(shards.root, Path)


def decoded_bytes(shards: ShardSet, config: DataConfig) -> int:
    """Bytes of all splits as loader `resident` keeps them."""
    return sum(_split_bytes(shards, name, config) for name in SPLITS if shards.num_samples(name))


def _split_bytes(shards: ShardSet, name: str, config: DataConfig) -> int:
    split = shards.split(name)
    side = config.resident.min_side or round(config.image_size / config.augment.eval_crop)
    short_N: IntArray = np.minimum(split.heights_N, split.widths_N)
    scale_N = np.minimum(1.0, side / short_N)
    return int((3 * np.rint(split.heights_N * scale_N) * np.rint(split.widths_N * scale_N)).sum())


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: the device's, or on a host what it can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
