"""Networks that timm built, exported: its own names, classifier and image size, by every format that takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bce3s.config import ModelConfig
from bce3s.export.plain import Export, plain_network
from bce3s.models import build_recogniser
from tests.bce3s.export.exports import write

SIDE_PX = 32


def of_timm(export: Export, arch: str) -> Export:
    """A network of timm in the place of a run's, built for the images of the run as training does."""
    pytest.importorskip("timm", reason="timm is not installed")
    config = ModelConfig(arch=arch, projection_dim=8)
    model = build_recogniser(config, len(export.trained.class_names), image_sides=(SIDE_PX,)).eval()
    run_config = replace(export.trained.config, model=config, data=replace(export.trained.config.data, image_size=SIDE_PX))
    return Export(network=plain_network(model), trained=replace(export.trained, model=model, config=run_config))


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        # Classifiers by three names, one of them behind layers of its own, and an image size that is built in.
        ("timm:test_resnet", "timm"),
        ("timm:test_convnext", "timm"),
        ("timm:mobilenetv3_small_050", "timm"),
        ("timm:test_vit", "timm"),
        ("timm:test_vit", "safetensors"),
        ("timm:test_vit", "torchscript"),
        ("timm:test_vit", "onnx"),
    ],
)
def test_a_network_of_timm_is_what_it_was(export: Export, tmp_path: Path, arch: str, name: str) -> None:
    parity = write(of_timm(export, arch), name, tmp_path).parity
    assert parity is not None
    assert parity.holds, parity.sentence()
    assert parity.reader.startswith("timm ") == (name == "timm")
