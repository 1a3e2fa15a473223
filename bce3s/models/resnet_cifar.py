"""The thin ResNets for 32-pixel images of He et al. 2016, section 4.2: ResNet-20, 32, 44 and 56."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bce3s.models.backbone import Backbone
from bce3s.models.resnet import BasicBlock
from pipelines.config import require


class SubsampleShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the `new_channels` (even), half before and half after the old ones; no parameters."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.padding = new_channels // 2

    def forward(self, x_VCHW: Tensor) -> Tensor:
        """[V, C, H, W] to [V, C + new_channels, H/2, W/2] (rounded up)."""
        return F.pad(x_VCHW[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class ResNetCifar(Backbone):
    """Three stages of 16, 32 and 64 channels, then the mean over the image.

    Args:
        depth: layers as the paper counts them, 6n + 2 with n blocks a stage.
        width: factor on every channel count; 4 is the "ResNet-32" of GLMC (Du et al. 2023).

    Raises:
        ConfigError: a depth other than 6n + 2, or a width below 1.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, *, width: int = 1) -> None:
        super().__init__()
        require(depth >= 8 and depth % 6 == 2, f"depth must be 6n + 2 (20, 32, 44, 56, ...), not {depth}")
        require(width >= 1, f"width must be at least 1, not {width}")
        in_channels = 16 * width
        self.conv1 = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        for stage, channels in enumerate((16 * width, 32 * width, 64 * width), start=1):
            blocks = nn.Sequential()
            for _ in range(depth // 6):
                grows = channels != in_channels
                downsample = SubsampleShortcut(channels - in_channels) if grows else None
                blocks.append(BasicBlock(in_channels, channels, 2 if grows else 1, downsample))
                in_channels = channels
            self.add_module(f"layer{stage}", blocks)
        self.feature_dim = in_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # fan_in, as the long-tail papers on this network start it (LDAM, BCL, ProCo); torchvision's rule is fan_out.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, images_V3HW: Tensor) -> Tensor:
        """Normalised images [V, 3, H, W] to features [V, D]; under autocast they come in its dtype."""
        x: Tensor = F.relu(self.bn1(self.conv1(images_V3HW)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean(dim=(2, 3))
