"""Which device, precision and memory layout a run uses, and what it ran on."""

from __future__ import annotations

import functools
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from bce3s.config import TrainConfig
from pipelines.types import BackendError

_ABSENT = "not installed"
_DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
_PACKAGES = ("torch", "torchvision", "triton", "ffcv", "webdataset", "numba", "numpy", "pillow", "bce3s")


@dataclass(frozen=True)
class Placement:
    """A resolved device and precision.

    Args:
        device: where tensors live.
        precision: "bf16", "fp16" or "fp32".
        channels_last: memory format of weights and views.
    """

    device: torch.device
    precision: str
    channels_last: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the views handed to the network."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed-precision context; nothing in fp32."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, dtype=self.dtype)


def resolve_device(name: str) -> torch.device:
    """The device `name` stands for: "auto" is the first CUDA device where there is one, else the CPU.

    Raises:
        BackendError: an unknown device, or CUDA asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"unknown device '{name}'; known: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"device '{name}' is not supported; known: auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(f"device '{name}' asked for, but torch {torch.__version__} sees no CUDA device; take --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise BackendError(f"device '{name}' asked for, but there are only {torch.cuda.device_count()} CUDA devices, counted from 0")
        # Pinned memory belongs to the current device's context; without this it would open one on device 0 as well.
        torch.cuda.set_device(device.index or 0)
        return torch.device("cuda", device.index or 0)
    return device


def resolve_placement(config: TrainConfig, local_rank: int = 0) -> Placement:
    """Device, precision and layout of a run. "auto" precision is bf16 where the hardware multiplies it, else fp32.

    Args:
        config: of the run.
        local_rank: of this process on its machine; "auto" and "cuda" are the CUDA device of that number.

    Raises:
        BackendError: the device cannot be used, or fp16 is asked for on a CPU.
    """
    # By its number at once: to make device 0 the current one, if only for a moment, would open a context of every rank on it.
    on_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = resolve_device(f"cuda:{local_rank}" if on_cuda else config.device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if _has_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise BackendError("precision fp16 needs a GPU; take --precision bf16 or fp32 on a CPU")
    return Placement(device, precision, config.channels_last != "off")


def apply_numerics(config: TrainConfig) -> None:
    """Sets torch's process-wide switches: TF32, and kernels chosen for speed or for the same bits every time.

    Must come before the first kernel: cuBLAS reads its workspace setting once.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cudnn.deterministic = config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    # Filling fresh memory with NaN finds reads of what nobody wrote; it changes no result and costs 5 to 9 % of a step (docs/log.md).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware of this process, for the run's record."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": package_versions(),
    }


@functools.cache
def package_versions() -> dict[str, str]:
    """Of the packages that results may depend on."""
    dali = next((package for package in _DALI_PACKAGES if _version(package) != _ABSENT), _DALI_PACKAGES[0])
    return {package: _version(package) for package in (dali, *_PACKAGES)}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _ABSENT
