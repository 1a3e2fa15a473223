"""Write a trained network for other programs: `load_exported` reads what `--format safetensors` wrote; the command is `bce3s export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bce3s.export.inference_weights import Exported, load_exported

__all__ = ["Exported", "load_exported"]


def __getattr__(name: str) -> Any:
    """What `inference_weights` has, imported once it is asked for: the command line knows `command` without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bce3s.export import inference_weights

    return getattr(inference_weights, name)
