"""The command `bce3s predict`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations


def predict() -> None:
    """Name the classes of images with a trained network."""
    raise NotImplementedError
