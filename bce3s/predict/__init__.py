"""Classes of image files by a trained network: `Predictor`, and the command `bce3s predict`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bce3s.predict.files import Prediction, Predictor, confidence_of

__all__ = ["Prediction", "Predictor", "confidence_of"]


def __getattr__(name: str) -> Any:
    """What `files` has, imported once it is asked for: the command line knows `command` without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bce3s.predict import files

    return getattr(files, name)
