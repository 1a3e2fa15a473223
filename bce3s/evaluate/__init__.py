"""Evaluation of a trained network: `evaluate` over a loader, and the command `bce3s evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bce3s.evaluate.split import classifier_rows, evaluate, features_and_logits

__all__ = ["classifier_rows", "evaluate", "features_and_logits"]


def __getattr__(name: str) -> Any:
    """What `split` has, imported once it is asked for: the command line knows `command` without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bce3s.evaluate import split

    return getattr(split, name)
