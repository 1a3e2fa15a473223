"""The command `bce3s export`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations


def export() -> None:
    """Write a trained network for other programs."""
    raise NotImplementedError
