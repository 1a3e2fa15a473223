"""Runs opened for export, other networks in their place, and a format that computes something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bce3s.config import ModelConfig
from bce3s.export.formats import Format, GraphOptions, Opened, load_format
from bce3s.export.plain import Export, plain_network
from bce3s.export.write import Written, write_checked
from bce3s.models import build_recogniser
from bce3s.train import open_network


def opened_for_export(place: Path) -> Export:
    trained = open_network(place, device="cpu")
    return Export(network=plain_network(trained.model), trained=trained)


def with_network(export: Export, arch: str, classifier: str = "normalized") -> Export:
    """Another network in the place of a run's: random weights, batch-norms that have seen images, in channels-last as in training."""
    config = ModelConfig(arch=arch, classifier=classifier, projection_dim=8, classifier_scale=20.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_recogniser(config, len(export.trained.class_names)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.features(torch.randn(16, 3, export.image_size, export.image_size))
        for parameter in model.classifier.parameters():
            parameter.mul_(3.0)  # so that lengths matter where they are kept
    trained = replace(export.trained, model=model.eval(), config=replace(export.trained.config, model=config))
    return Export(network=plain_network(model), trained=trained)


def write(export: Export, name: str, folder: Path, *, check: bool = True, **options: Any) -> Written:
    graph = GraphOptions(**options)
    chosen = load_format(name, graph)
    return write_checked(export, chosen, graph, folder / f"net{chosen.suffix}", shards=None, check=check)


def _encode_doubled(export: Export, options: GraphOptions) -> dict[str, bytes]:
    return {"": b"twice the logits"}


def _open_doubled(path: Path, export: Export) -> Opened:
    assert path.read_bytes() == b"twice the logits"
    doubled: Callable[[Tensor], Tensor] = lambda images: 2 * export.network(images)  # noqa: E731
    return Opened(torch.inference_mode()(doubled), "a program that doubles")


DOUBLED = Format(encode=_encode_doubled, open=_open_doubled, usage=lambda *_: "", suffix=".doubled")
