"""The assembled network: names, shapes, what a checkpoint holds, and idle heads under an optimizer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bce3s.config import ModelConfig
from bce3s.models import ARCHS, build_recogniser
from pipelines.types import ConfigError


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_builds(arch: str) -> None:
    with torch.device("meta"):
        recogniser = build_recogniser(ModelConfig(arch=arch, projection_dim=12), 10)
        images_V3HW = torch.empty(2, 3, 32, 32)
        feature_dim = recogniser.backbone.feature_dim
        assert recogniser.features(images_V3HW).shape == (2, feature_dim)
        assert recogniser(images_V3HW).shape == (2, 10)
        assert recogniser.projector(torch.empty(2, feature_dim)).shape == (2, 12)
    assert recogniser.feature_memory.rows_KP.shape == (10, 12)
    assert "\n" not in ARCHS[arch].summary


def test_summaries_state_the_size() -> None:
    for entry in ARCHS.values():
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in entry.build().parameters())
        stated = re.search(r"([\d.]+) M parameters", entry.summary)
        assert stated is not None
        assert float(stated[1]) == pytest.approx(num_parameters / 1e6, rel=0.03)


def test_logits_are_the_classifier_on_the_features() -> None:
    recogniser = build_recogniser(ModelConfig(arch="resnet20-cifar"), 5).eval()
    images_V3HW = torch.randn(2, 3, 32, 32)
    weight_KD = recogniser.classifier.weight / recogniser.classifier.weight.norm(dim=1, keepdim=True)
    expected_VK = recogniser.features(images_V3HW) @ weight_KD.T + recogniser.classifier.bias
    torch.testing.assert_close(recogniser(images_V3HW), expected_VK)


def test_a_checkpoint_carries_the_memory(tmp_path: Path) -> None:
    first, second = (build_recogniser(ModelConfig(arch="resnet20-cifar", projection_dim=3), 4) for _ in range(2))
    first.feature_memory.update(torch.randn(3, 3), torch.tensor([0, 3, 3]))
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert {key.split(".")[0] for key in first.state_dict()} == {"backbone", "classifier", "projector", "feature_memory"}
    assert second.feature_memory.filled_K.tolist() == [True, False, False, True]
    assert torch.equal(second.feature_memory.rows_KP, first.feature_memory.rows_KP)


def test_an_idle_projector_is_left_alone_by_the_optimizer() -> None:
    recogniser = build_recogniser(ModelConfig(arch="resnet20-cifar"), 4)
    before = {key: value.clone() for key, value in recogniser.named_parameters()}
    optimizer = torch.optim.SGD(recogniser.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        recogniser(torch.randn(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()
    unmoved = {key for key, value in recogniser.named_parameters() if torch.equal(value, before[key])}
    assert unmoved == {key for key in before if key.startswith("projector.")}


def test_unknown_architecture_lists_the_known_ones() -> None:
    forms = r"timm:NAME, package\.module:factory; did you mean 'resnet18'\?"
    with pytest.raises(ConfigError, match=rf"^unknown arch 'resnet19'; known: resnet8-cifar, .*resnext50-32x4d, {forms}$"):
        build_recogniser(ModelConfig(arch="resnet19"), 10)


@pytest.mark.parametrize(("num_classes", "projection_dim"), [(0, 8), (3, 0)])
def test_sizes_must_be_positive(num_classes: int, projection_dim: int) -> None:
    with pytest.raises(ConfigError, match=r"^(num_classes|projection_dim) must be at least 1, not 0$"):
        build_recogniser(ModelConfig(arch="resnet20-cifar", projection_dim=projection_dim), num_classes)
