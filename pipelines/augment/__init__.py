"""Whole-batch augmentation on the device: crop and flip, policies, mixing into the three views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.augment.mix import channel_statistics, mix_views, normalise

__all__ = ["channel_statistics", "mix_views", "normalise"]


def __getattr__(name: str) -> Any:
    """What `mix` has, imported once it is asked for: the loaders need other parts, and mixing brings numba's kernels."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines.augment import mix

    return getattr(mix, name)
