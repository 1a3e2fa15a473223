"""The command `bce3s watch`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations


def watch() -> None:
    """Follow a run from another terminal."""
    raise NotImplementedError
