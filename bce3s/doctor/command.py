"""The command `bce3s doctor`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations


def doctor() -> None:
    """Say what this machine has, what is missing and what to choose."""
    raise NotImplementedError
