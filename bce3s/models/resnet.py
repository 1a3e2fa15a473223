"""ResNet (He et al. 2016) and ResNeXt (Xie et al. 2017) in torchvision's parameter naming, so that its weights load."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bce3s.models.backbone import Backbone
from pipelines.config import require_choice

STEMS: tuple[str, ...] = ("imagenet", "small")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride, and a shortcut: `downsample` where the shape changes, else the identity."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample

    def forward(self, x_VCHW: Tensor) -> Tensor:
        """[V, C, H, W] to [V, out_channels, H/stride, W/stride]."""
        out: Tensor = F.relu(self.bn1(self.conv1(x_VCHW)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x_VCHW if self.downsample is None else self.downsample(x_VCHW)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, the 3x3 `width` channels wide in `groups` groups, and a shortcut as in `BasicBlock`.

    The 3x3 carries the stride ("v1.5", as in torchvision); the paper's first 1x1 would drop three quarters of its input.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, groups: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample

    def forward(self, x_VCHW: Tensor) -> Tensor:
        """[V, C, H, W] to [V, out_channels, H/stride, W/stride]."""
        out: Tensor = F.relu(self.bn1(self.conv1(x_VCHW)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += x_VCHW if self.downsample is None else self.downsample(x_VCHW)
        return F.relu(out, inplace=True)


class ResNet(Backbone):
    """Four stages of residual blocks, 64 to 512 channels (times 4 with bottlenecks), then the mean over the image.

    Args:
        num_blocks: blocks of each stage.
        bottleneck: `Bottleneck` blocks instead of `BasicBlock`.
        groups: groups of the 3x3 convolution of a bottleneck.
        width_per_group: channels of such a group in the first stage.
        stem: "imagenet" is 7x7 stride 2 and max-pool (32 pixels a feature cell); "small" is 3x3 stride 1 without max-pool
            (8 pixels a cell), the ResNet-34 of the BCE3S reference for 32-pixel images.
        zero_init_residual: start each block as its shortcut by a zero scale in its last batch-norm (Goyal et al. 2017, 5.1).

    Raises:
        ConfigError: unknown stem; lists the known ones.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        num_blocks: tuple[int, int, int, int],
        *,
        bottleneck: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        stem: str = "imagenet",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        require_choice("stem", stem, STEMS)
        self.feature_dim = 2048 if bottleneck else 512
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        for stage, (channels, count) in enumerate(zip((64, 128, 256, 512), num_blocks, strict=True), start=1):
            width = channels * width_per_group // 64 * groups
            out_channels = 4 * channels if bottleneck else channels
            blocks = nn.Sequential()
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                downsample = _projection_shortcut(in_channels, out_channels, stride)
                if bottleneck:
                    blocks.append(Bottleneck(in_channels, width, out_channels, stride, groups, downsample))
                else:
                    blocks.append(BasicBlock(in_channels, out_channels, stride, downsample))
                in_channels = out_channels
            self.add_module(f"layer{stage}", blocks)
        _initialise(self, zero_init_residual)

    def forward(self, images_V3HW: Tensor) -> Tensor:
        """Normalised images [V, 3, H, W] to features [V, D]; under autocast they come in its dtype."""
        x: Tensor = self.maxpool(F.relu(self.bn1(self.conv1(images_V3HW)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


def _projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _initialise(network: ResNet, zero_init_residual: bool) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
            last_norm = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.zeros_(last_norm.weight)
