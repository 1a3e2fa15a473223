"""ResNet and ResNeXt against the published facts of torchvision's: sizes, operations and key names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bce3s.models import ARCHS
from bce3s.models.resnet import BasicBlock, ResNet
from pipelines.types import ConfigError

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# arch: parameters without fc, 10^9 multiply-adds of one image at the design size (torchvision's model table, less fc), blocks
PUBLISHED = {
    "resnet18": (11_176_512, 1.814, (2, 2, 2, 2)),
    "resnet34": (21_284_672, 3.663, (3, 4, 6, 3)),
    "resnet50": (23_508_032, 4.087, (3, 4, 6, 3)),
    "resnet101": (42_500_160, 7.799, (3, 4, 23, 3)),
    "resnext50-32x4d": (22_979_904, 4.228, (3, 4, 6, 3)),
    "resnet34-small-stem": (21_276_992, 1.159, (3, 4, 6, 3)),
}
SMALL_NETS: dict[str, dict[str, Any]] = {
    "basic": {},
    "basic-small-stem": {"stem": "small"},
    "bottleneck": {"bottleneck": True},
    "grouped": {"bottleneck": True, "groups": 32, "width_per_group": 4},
}


def expected_keys(num_blocks: tuple[int, ...], convs_per_block: int) -> list[str]:
    """The state dict keys of torchvision's resnets in their order, without fc."""
    keys = ["conv1.weight", *(f"bn1.{entry}" for entry in NORM)]
    for stage, count in enumerate(num_blocks, start=1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            for conv in range(1, convs_per_block + 1):
                keys += [f"{prefix}.conv{conv}.weight", *(f"{prefix}.bn{conv}.{entry}" for entry in NORM)]
            if block == 0 and (stage > 1 or convs_per_block == 3):
                keys += [f"{prefix}.downsample.0.weight", *(f"{prefix}.downsample.1.{entry}" for entry in NORM)]
    return keys


def small_net(name: str) -> ResNet:
    torch.manual_seed(0)
    return ResNet((1, 1, 1, 1), **SMALL_NETS[name])


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameters_operations_keys_and_shape_are_torchvisions(arch: str) -> None:
    num_parameters, giga_multiply_adds, num_blocks = PUBLISHED[arch]
    entry = ARCHS[arch]
    with torch.device("meta"):
        backbone = entry.build()
        with FlopCounterMode(display=False) as counter:
            features_VD = backbone(torch.empty(2, 3, entry.image_size, entry.image_size))
    is_basic = "18" in arch or "34" in arch
    assert sum(parameter.numel() for parameter in backbone.parameters()) == num_parameters
    # The operations tell the strides apart: with the stride on the first 1x1, ResNet-50 has 3.8 of them.
    assert counter.get_total_flops() / 2 / 2 / 1e9 == pytest.approx(giga_multiply_adds, abs=6e-4)
    assert list(backbone.state_dict()) == expected_keys(num_blocks, 2 if is_basic else 3)
    assert features_VD.shape == (2, backbone.feature_dim) == (2, 512 if is_basic else 2048)


@pytest.mark.parametrize("name", SMALL_NETS)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    backbone = small_net(name)
    features_VD = backbone(torch.randn(4, 3, 64, 64))
    (features_VD * torch.randn_like(features_VD)).sum().backward()
    idle = [key for key, parameter in backbone.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []


@pytest.mark.parametrize("name", SMALL_NETS)
def test_channels_last_gives_the_same_features(name: str) -> None:
    backbone = small_net(name).eval()
    images_V3HW = torch.randn(2, 3, 48, 40)
    with torch.inference_mode():
        planar_VD = backbone(images_V3HW)
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        packed_VD = backbone(images_V3HW.to(memory_format=torch.channels_last))
    torch.testing.assert_close(packed_VD, planar_VD, rtol=1e-4, atol=1e-5)


def test_autocast_gives_finite_features_in_its_dtype() -> None:
    backbone = small_net("bottleneck")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features_VD = backbone(torch.randn(2, 3, 64, 64))
    assert features_VD.dtype == torch.bfloat16
    assert features_VD.isfinite().all()


def test_compiles_without_a_graph_break() -> None:
    backbone = small_net("basic-small-stem").eval()
    images_V3HW = torch.randn(2, 3, 16, 16)
    traced = torch.compile(backbone, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(images_V3HW), backbone(images_V3HW))


def test_convolutions_start_with_the_fan_out_deviation() -> None:
    weight = small_net("basic").layer4.get_parameter("0.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_zero_init_residual_starts_blocks_as_their_shortcut(bottleneck: bool) -> None:
    blocks = ResNet((2, 1, 1, 1), bottleneck=bottleneck, zero_init_residual=True).layer1[1:].eval()
    x_VCHW = torch.rand(1, 256 if bottleneck else 64, 5, 5)
    torch.testing.assert_close(blocks(x_VCHW), x_VCHW, rtol=0, atol=0)


def test_basic_block_adds_its_shortcut_before_the_last_relu() -> None:
    block = BasicBlock(4, 4, 1, None).eval()
    x_VCHW = torch.randn(2, 4, 6, 6)
    inner = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)
    torch.testing.assert_close(block(x_VCHW), (inner(x_VCHW) + x_VCHW).relu())


def test_unknown_stem_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^unknown stem 'cifar'; known: imagenet, small$"):
        ResNet((1, 1, 1, 1), stem="cifar")
