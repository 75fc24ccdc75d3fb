"""StackedUnets: two U-Nets with different down-samplers side by side (ASGSSD, Table 1 and figure 5).

Source: the paper's figure 5 shows the operators and edges; channels are not published.
Known: the graph; the full network's size; the size of the paper's sub-network, which its text describes: the
second U-Net and the deepest path of the first one are gone.
Ours: the channels, chosen to meet both sizes (3×32×32 input, FLOPs = 2 × MACs, convolutions with bias).

| network                             | parameters | paper  | FLOPs    | paper |
| ----------------------------------- | ---------- | ------ | -------- | ----- |
| full                                | 800,074    | 0.80 M | 184.15 M | 184 M |
| without `right` and `left.level4`   | 365,434    | 0.37 M | 114.72 M | 115 M |
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["StackedUnets", "UNet", "UNetWidths"]


@dataclass(frozen=True)
class UNetWidths:
    """Channels of a U-Net: at full size; where the lower levels join; inside levels 2, 3 and 4."""

    first: int
    join: int
    inner2: int
    inner3: int
    inner4: int

    def scaled(self, factor: float) -> "UNetWidths":
        """All widths times `factor`, rounded, at least 1."""
        channels = (self.first, self.join, self.inner2, self.inner3, self.inner4)
        return UNetWidths(*(max(1, round(factor * c)) for c in channels))


LEFT = UNetWidths(first=16, join=80, inner2=88, inner3=144, inner4=56)
RIGHT = UNetWidths(first=16, join=56, inner2=56, inner3=88, inner4=72)


class UNet(nn.Module):
    """Four levels down, each half the size of the one above, and up again with an addition at every level.

    >>> UNet(3, LEFT.scaled(0.25), pooled=True)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 4, 16, 16])

    Args:
        inputs: channels of the input.
        widths: of the levels; `widths.first` is also the number of output channels.
        pooled: halve the size by max pools; otherwise by convolutions of stride 2.

    Shapes: float [N, inputs, H, W] → [N, widths.first, H, W], with H and W divisible by 8.
    """

    def __init__(self, inputs: int, widths: UNetWidths, pooled: bool) -> None:
        super().__init__()
        levels = _pooled_levels if pooled else _strided_levels
        self.level1, self.level2, self.level3, self.level4 = levels(inputs, widths)
        self.resize = nn.Upsample(scale_factor=2)
        self.up = _chain(
            conv1=_conv(widths.join, widths.inner2),
            conv2=_conv(widths.inner2, widths.first),
            bn=nn.BatchNorm2d(widths.first),
            relu=nn.ReLU(),
            resize=nn.Upsample(scale_factor=2),
        )
        self.last = _chain(
            relu1=nn.ReLU(),
            conv=_conv(widths.first, widths.first),
            relu2=nn.ReLU(),
            bn=nn.BatchNorm2d(widths.first),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.level1(x)
        x2 = self.level2(x1)
        x3 = self.level3(x2)
        x3 = x3 + self.level4(x3)
        x2 = x2 + self.resize(x3)
        x1 = x1 + self.up(x2)
        return self.last(x1)


class StackedUnets(nn.Module):
    """Two U-Nets on the same image, added; mean; linear.

    >>> StackedUnets(width=0.25)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])

    Args:
        width: factor on all hidden channels; 1 is the paper's size.

    Shapes: float [N, in_channels, H, W] → [N, num_classes], with H and W divisible by 8.
    """

    def __init__(self, width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        left = LEFT.scaled(width)
        self.left = UNet(in_channels, left, pooled=True)
        self.right = UNet(in_channels, RIGHT.scaled(width), pooled=False)
        self.linear = nn.Linear(left.first, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x) + self.right(x)
        return self.linear(torch.mean(x, dim=(2, 3)))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


def _chain(**layers: nn.Module) -> nn.Sequential:
    """Layers one after another, named for the drawings."""
    return nn.Sequential(OrderedDict(layers))


def _pooled_levels(inputs: int, w: UNetWidths) -> tuple[nn.Sequential, ...]:
    return (
        _chain(
            conv1=_conv(inputs, w.first),
            bn=nn.BatchNorm2d(w.first),
            relu=nn.ReLU(),
            conv2=_conv(w.first, w.first),
        ),
        _chain(
            pool=nn.MaxPool2d(2),
            conv1=_conv(w.first, w.inner2),
            relu1=nn.ReLU(),
            conv2=_conv(w.inner2, w.join),
            relu2=nn.ReLU(),
            bn=nn.BatchNorm2d(w.join),
        ),
        _chain(pool=nn.MaxPool2d(2), conv1=_conv(w.join, w.inner3), conv2=_conv(w.inner3, w.join)),
        _chain(
            pool=nn.MaxPool2d(2),
            conv1=_conv(w.join, w.inner4),
            conv2=_conv(w.inner4, w.join),
            resize=nn.Upsample(scale_factor=2),
        ),
    )


def _strided_levels(inputs: int, w: UNetWidths) -> tuple[nn.Sequential, ...]:
    return (
        _chain(conv=_conv(inputs, w.first), bn=nn.BatchNorm2d(w.first), relu=nn.ReLU()),
        _chain(conv1=_conv(w.first, w.inner2, stride=2), conv2=_conv(w.inner2, w.join), relu=nn.ReLU()),
        _chain(
            conv1=_conv(w.join, w.inner3, stride=2),
            relu=nn.ReLU(),
            bn=nn.BatchNorm2d(w.inner3),
            conv2=_conv(w.inner3, w.inner3),
            conv3=_conv(w.inner3, w.join),
        ),
        _chain(
            conv1=_conv(w.join, w.inner4, stride=2),
            conv2=_conv(w.inner4, w.inner4),
            conv3=_conv(w.inner4, w.join),
            resize=nn.Upsample(scale_factor=2),
        ),
    )
