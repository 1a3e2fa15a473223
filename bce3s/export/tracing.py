"""What formats that store the computation share: the module that is traced, its example input, and why a trace failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bce3s.export.formats import GraphOptions
from bce3s.export.plain import Export, FromPixels
from pipelines.types import ConfigError


def traced(export: Export, options: GraphOptions) -> nn.Module:
    """The network, with its normalisation in front where that was asked for."""
    return FromPixels(export.network, export.augment).eval() if options.preprocess else export.network


def example(export: Export, options: GraphOptions) -> Tensor:
    """Two images: uint8 [2, H, W, 3] or float32 [2, 3, H, W]. A batch of one would be taken for a constant."""
    side = export.image_size
    return torch.zeros(2, side, side, 3, dtype=torch.uint8) if options.preprocess else torch.zeros(2, 3, side, side)


def input_text(export: Export, options: GraphOptions) -> str:
    """'uint8 [B, 224, 224, 3], RGB pixels' or 'float32 [B, 3, 224, 224], normalised'."""
    side = "H, W" if options.dynamic_size else f"{export.image_size}, {export.image_size}"
    return f"uint8 [B, {side}, 3], RGB pixels" if options.preprocess else f"float32 [B, 3, {side}], normalised"


@contextmanager
def explained(export: Export, format_name: str) -> Iterator[None]:
    """Turns what a tracer raises on a network it cannot follow into a sentence; it has dozens of kinds, and a user's module meets any."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"torch cannot write {export.arch} as {format_name} ({type(error).__name__}: {reason}); take --format safetensors"
        ) from error
