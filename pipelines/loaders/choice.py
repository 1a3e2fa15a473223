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
_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class LoaderChoice:
    """A resolved loader.

    Args:
        name: of `LOADERS`.
        reason: why, in a few words for people.
        resident_fits: whether loader `resident` would have room for all splits.
        streamed: whether the shards lie at a URL.
    """

    name: str
    reason: str
    resident_fits: bool = False
    streamed: bool = False


def choose_loader(config: DataConfig, shards: ShardSet, device: torch.device) -> LoaderChoice:
    """Resolves `config.loader`, a name of `LOADERS` or "auto".

    Streamed shards can only be streamed. Where DALI is missing FFCV decodes, if the shards have betons. A decoded set that fits is kept:
    nothing is faster. Else DALI decodes, on the GPU where there is one.
    """
    if is_streamed(shards) and config.loader == "auto":
        return LoaderChoice(name="webdataset", reason="shards at a URL", streamed=True)
    if is_streamed(shards):
        return LoaderChoice(name=config.loader, reason="as configured", streamed=True)
    needed, room = decoded_bytes(shards, config), free_bytes(device)
    fits = needed <= room * _SHARE
    if config.loader != "auto":
        return LoaderChoice(name=config.loader, reason="as configured", resident_fits=fits)
    if not is_installed("nvidia.dali") and is_installed("ffcv") and "beton" in shards.manifest["splits"]["train"]:
        return LoaderChoice(name="ffcv", reason="DALI is not installed", resident_fits=fits)
    size = f"{needed / GIB:.1f} GiB" if needed >= GIB / 10 else f"{needed / (1 << 20):.0f} MiB"
    place = f"half of the {room / GIB:.0f} GiB free on {'the host' if device.type == 'cpu' else device}"
    if fits:
        return LoaderChoice(name="resident", reason=f"the decoded set takes {size}, less than {place}", resident_fits=True)
    return LoaderChoice(name="dali", reason=f"the decoded set takes {size}, more than {place}")


def is_installed(package: str) -> bool:
    """Whether a package can be found, without importing more than what it lies in."""
    try:
        return find_spec(package) is not None
    except ImportError:  # what it lies in is not there, or broken
        return False


def is_streamed(shards: ShardSet) -> bool:
    """Whether the shards lie where they cannot be mapped into memory."""
    return not isinstance(shards.root, Path)


def decoded_bytes(shards: ShardSet, config: DataConfig) -> int:
    """Bytes of all splits as loader `resident` keeps them."""
    return sum(resident_bytes(shards.split(name), config) for name in SPLITS if shards.num_samples(name))


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: the device's, or on a host what it can give without swapping."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_host_bytes()
