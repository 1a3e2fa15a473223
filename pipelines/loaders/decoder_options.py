"""How DALI's image decoder is set up on this device, and the hardware decoder's share that was found best on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.durable import write_atomically
from pipelines.loaders.dali_package import types
from pipelines.loaders.planned import PixelRequest

# Sizes to allocate for in advance: larger images exist (ImageNet has one of 9,331 px), but they are too rare to hold memory for.
_HINT_QUANTILE = 0.999


def decoder_options(request: PixelRequest) -> dict[str, Any]:
    """Keyword arguments of `fn.decoders.*`: device and output, and on a GPU hardware share and what to allocate in advance."""
    options: dict[str, Any] = {"device": "mixed" if request.device.type == "cuda" else "cpu", "output_type": types.RGB}
    if request.device.type != "cuda":
        return options
    load = request.config.dali.hw_decoder_load
    if load < 0:
        load = remembered_load(torch.cuda.get_device_name(request.device))
    if load >= 0:
        options["hw_decoder_load"] = load
    options["preallocate_height_hint"] = int(np.quantile(request.split.heights_N, _HINT_QUANTILE, method="higher"))
    options["preallocate_width_hint"] = int(np.quantile(request.split.widths_N, _HINT_QUANTILE, method="higher"))
    return options


def memory_file() -> Path:
    """Where the best shares are kept, one a GPU model: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bce3s" / "hw_decoder_load.json"


def remembered_load(gpu: str) -> float:
    """The share found best for GPUs named `gpu` on this machine, −1 if none was or the file cannot be read."""
    try:
        load = json.loads(memory_file().read_text(encoding="utf-8"))[gpu]
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0
    return float(load) if isinstance(load, (int, float)) and 0 <= load <= 1 else -1.0


def remember_load(gpu: str, load: float) -> None:
    """Keeps `load` (0…1) as the best share for GPUs named `gpu`.

    Raises:
        OSError: the file cannot be written.
    """
    path = memory_file()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**(known if isinstance(known, dict) else {}), gpu: load}, indent=1).encode())
