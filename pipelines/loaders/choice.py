"""Which loader `auto` means, by where the shards are, how large the set is decoded, and what memory there is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from pipelines.config import DataConfig
from pipelines.format import ShardSet
from pipelines.loaders.resident_size import GIB, free_host_bytes, resident_bytes
from pipelines.types import SPLITS

# The network, its gradients and activations need the rest of a GPU; on a host, so do the page cache and other processes.
_SHARE_OF_DEVICE, _SHARE_OF_HOST = 0.5, 0.5


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
    size = f"decoded, the set has {needed / GIB:.1f} GiB" if needed >= GIB / 10 else f"decoded, the set has {needed / (1 << 20):.0f} MiB"
    free = f"of {room / GIB:.0f} GiB free on {'the host' if device.type == 'cpu' else device}"
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
    return sum(resident_bytes(shards.split(name), config) for name in SPLITS if shards.num_samples(name))


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: the device's, or on a host what it can give without swapping."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_host_bytes()
