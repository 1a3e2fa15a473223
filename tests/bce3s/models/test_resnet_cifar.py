"""The CIFAR ResNets against the table of He et al. 2016 and the common re-implementations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bce3s.models.resnet_cifar import ResNetCifar, SubsampleShortcut
from pipelines.types import ConfigError


# He et al. 2016, table 6, counts millions with the classifier of 10 classes: 0.27, 0.46, 0.66, 0.85.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_parameters_are_the_papers(depth: int, millions: float) -> None:
    with torch.device("meta"):
        backbone = ResNetCifar(depth)
    with_classifier = sum(parameter.numel() for parameter in backbone.parameters()) + 64 * 10 + 10
    assert round(with_classifier / 1e6, 2) == millions
    assert sum(key.endswith(("conv1.weight", "conv2.weight")) for key in backbone.state_dict()) == depth - 1


def test_resnet32_costs_seventy_million_multiply_adds() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ResNetCifar(32)(torch.empty(1, 3, 32, 32))
    assert counter.get_total_flops() / 2 / 1e6 == pytest.approx(69, abs=0.5)


@pytest.mark.parametrize("width", [1, 4])
def test_width_multiplies_the_feature_dimension(width: int) -> None:
    with torch.device("meta"):
        backbone = ResNetCifar(32, width=width)
        features_VD = backbone(torch.empty(3, 3, 32, 32))
    assert features_VD.shape == (3, 64 * width)
    assert backbone.feature_dim == 64 * width


def test_keys_follow_torchvision_without_shortcut_weights() -> None:
    with torch.device("meta"):
        keys = list(ResNetCifar(20).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layers = [("conv1", "bn1")]
    layers += [(f"layer{s}.{b}.conv{i}", f"layer{s}.{b}.bn{i}") for s in (1, 2, 3) for b in range(3) for i in (1, 2)]
    assert keys == [key for conv, bn in layers for key in (f"{conv}.weight", *(f"{bn}.{entry}" for entry in norm))]


def test_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros() -> None:
    x_VCHW = torch.randn(2, 4, 5, 6)
    out = SubsampleShortcut(4)(x_VCHW)
    expected = torch.zeros(2, 8, 3, 3)
    for row in range(3):
        for column in range(3):
            expected[:, 2:6, row, column] = x_VCHW[:, :, 2 * row, 2 * column]
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_every_parameter_receives_a_gradient() -> None:
    torch.manual_seed(0)
    backbone = ResNetCifar(20)
    features_VD = backbone(torch.randn(4, 3, 32, 32))
    (features_VD * torch.randn_like(features_VD)).sum().backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_channels_last_gives_the_same_features() -> None:
    torch.manual_seed(0)
    backbone = ResNetCifar(20).eval()
    images_V3HW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        planar_VD = backbone(images_V3HW)
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        packed_VD = backbone(images_V3HW.to(memory_format=torch.channels_last))
    torch.testing.assert_close(packed_VD, planar_VD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [7, 18, 2])
def test_depth_must_be_six_n_plus_two(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"^depth must be 6n \+ 2 .* not {depth}$"):
        ResNetCifar(depth)


def test_width_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"^width must be at least 1, not 0$"):
        ResNetCifar(20, width=0)
