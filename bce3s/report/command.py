"""The command `bce3s report`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations


def report() -> None:
    """Draw one page of figures of one or several runs."""
    raise NotImplementedError
