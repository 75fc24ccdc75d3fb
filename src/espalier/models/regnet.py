"""RegNetX for small images (Radosavovic et al., 2020; the ablation of ASGSSD, Table 4).

Source: the published design rule and its parameters for 200, 400, 600 and 800 MF: exact widths and depths.
Ours: for 32×32 images the stem and the first stage keep the size (the paper does not say what it does).

| network       | 3×32×32, 10 classes: parameters, MACs | 3×224×224, 1000 classes | published    |
| ------------- | ------------------------------------- | ----------------------- | ------------ |
| RegNetX-200MF | 2,319,482, 59.9 M                     | 2,684,792, 199.0 M      | 2.7 M, 200 M |
| RegNetX-400MF | 4,775,274, 122.9 M                    | 5,157,512, 397.7 M      | 5.2 M, 400 M |
| RegNetX-600MF | 5,672,330, 188.7 M                    | 6,196,040, 600.9 M      | 6.2 M, 600 M |
| RegNetX-800MF | 6,593,386, 252.0 M                    | 7,259,656, 799.7 M      | 7.3 M, 800 M |

The ImageNet geometry is `stem_stride=2, strides=(2, 2, 2, 2)`. With `strides=(1, 1, 2, 2)`, another habit for
CIFAR-10, the four need 220.9, 462.1, 689.5 and 926.6 M MACs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "RegNetX",
    "regnet_widths",
    "regnet_x_200m",
    "regnet_x_400m",
    "regnet_x_600m",
    "regnet_x_800m",
]


def regnet_widths(depth: int, initial: int, slope: float, factor: float, group: int) -> tuple[list[int], list[int]]:
    """Widths and depths of the stages: u_j = initial + slope · j, rounded to initial · factorᵏ and to 8.

    >>> regnet_widths(22, 24, 24.48, 2.54, 16)
    ([32, 64, 160, 384], [1, 2, 7, 12])
    """
    blocks = []
    for j in range(depth):
        steps = round(math.log((initial + slope * j) / initial) / math.log(factor))
        blocks.append(8 * round(initial * factor**steps / 8))
    unique = sorted(set(blocks))
    return [group * round(width / group) for width in unique], [blocks.count(width) for width in unique]


class Block(nn.Module):
    """1×1, grouped 3×3, 1×1 convolutions beside an identity, or a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, group: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs // group, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv3 = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class RegNetX(nn.Module):
    """Stem, four stages of residual blocks, mean, linear.

    >>> RegNetX(widths=(16, 32), depths=(1, 2), group=8, strides=(1, 2))(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])

    Args:
        widths, depths, strides: of each stage: channels, blocks, stride of the first block.
        group: channels of one group of the 3×3 convolutions.
        stem_stride: of the first convolution, which has 32 channels.

    Shapes: float [N, in_channels, H, W] → [N, num_classes].
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        group: int,
        strides: Sequence[int] = (1, 2, 2, 2),
        stem_stride: int = 1,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(strides):
            raise ValueError(f"one width, depth and stride per stage: {widths}, {depths} and {strides}")
        self.conv = nn.Conv2d(in_channels, 32, 3, stem_stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.stages = nn.ModuleList()
        inputs = 32
        for width, depth, stride in zip(widths, depths, strides, strict=True):
            first = Block(inputs, width, stride, group)
            self.stages.append(nn.Sequential(first, *(Block(width, width, 1, group) for _ in range(depth - 1))))
            inputs = width
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        for stage in self.stages:
            x = stage(x)
        return self.linear(x.mean(dim=(2, 3)))


def _regnet(
    depth: int, initial: int, slope: float, factor: float, group: int, width: float, options: dict[str, Any]
) -> RegNetX:
    widths, depths = regnet_widths(depth, initial, slope, factor, group)
    scaled = [group * max(1, round(width * w / group)) for w in widths]
    return RegNetX(scaled, depths, group, **options)


def regnet_x_200m(width: float = 1.0, **options: Any) -> RegNetX:
    """RegNetX-200MF; `width` scales the channels in whole groups, `options` go to `RegNetX`.

    >>> regnet_x_200m(width=0.25, in_channels=1, num_classes=7)(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 7])
    """
    return _regnet(13, 24, 36.44, 2.49, 8, width, options)


def regnet_x_400m(width: float = 1.0, **options: Any) -> RegNetX:
    """RegNetX-400MF; see `regnet_x_200m`."""
    return _regnet(22, 24, 24.48, 2.54, 16, width, options)


def regnet_x_600m(width: float = 1.0, **options: Any) -> RegNetX:
    """RegNetX-600MF; see `regnet_x_200m`."""
    return _regnet(16, 48, 36.97, 2.24, 24, width, options)


def regnet_x_800m(width: float = 1.0, **options: Any) -> RegNetX:
    """RegNetX-800MF; see `regnet_x_200m`."""
    return _regnet(16, 56, 35.73, 2.28, 16, width, options)
