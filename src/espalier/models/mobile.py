"""A mobile network of Once-for-All's kind, of ofa-pixel1-143's size (Cai et al., 2019; ASGSSD, Table 6).

Source: the published search space: MobileNetV3's stages with channels × 1.2, blocks of expansion 3, 4 or 6
and kernel 3, 5 or 7, two to four blocks per stage, squeeze-excite and hard swish as in MobileNetV3-Large.
Known: that space; the size of the network found for the Pixel 1 at 143 ms (9.1 M parameters, 511 M FLOPs).
Ours: its expansions, kernels and depths, chosen to meet that size; FLOPs are MACs here, as in Once-for-All.
(Once-for-All's own list gives 9.2 M and 642 M at the input size that it chose, which the paper does not say.)

| network  | parameters | paper | MACs, 3×224×224 | paper |
| -------- | ---------- | ----- | --------------- | ----- |
| full     | 9,099,880  | 9.1 M | 510.8 M         | 511 M |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["PIXEL1_STAGES", "InvertedResidual", "MobileNet", "Stage"]


@dataclass(frozen=True)
class Stage:
    """Blocks of one resolution: channels, expansion and kernel per block, first stride, how they act."""

    channels: int
    expansions: tuple[int, ...]
    kernels: tuple[int, ...]
    stride: int
    squeeze: bool
    hard_swish: bool


PIXEL1_STAGES = (
    Stage(32, (4, 4, 3, 3), (7, 5, 5, 3), 2, squeeze=False, hard_swish=False),
    Stage(48, (4, 3, 3, 3), (7, 5, 5, 3), 2, squeeze=True, hard_swish=False),
    Stage(96, (6, 4, 4, 4), (7, 5, 5, 3), 2, squeeze=False, hard_swish=True),
    Stage(136, (6, 4, 3, 3), (7, 5, 5, 3), 1, squeeze=True, hard_swish=True),
    Stage(192, (6, 6, 6, 6), (7, 5, 5, 3), 2, squeeze=True, hard_swish=True),
)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate between 0 and 1 that the channels' means decide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = _divisible(channels / 4)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * self.gate(self.expand(torch.relu(self.reduce(means))))


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise k×k, squeeze-excite, linear 1×1; plus the input where the shape is kept.

    >>> InvertedResidual(8, 8, 3, 5, 1, nn.Hardswish)(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        expansion: int,
        kernel: int,
        stride: int,
        activation: Callable[[], nn.Module],
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        hidden = inputs if expansion == 1 else _divisible(inputs * expansion)
        expand = [] if expansion == 1 else [*_conv_bn(inputs, hidden, 1), activation()]
        depthwise = [*_conv_bn(hidden, hidden, kernel, stride, groups=hidden), activation()]
        gate = [SqueezeExcite(hidden)] if squeeze else []
        self.body = nn.Sequential(*expand, *depthwise, *gate, *_conv_bn(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNet(nn.Module):
    """Stem, inverted residual stages, and MobileNetV3's head.

    >>> model = MobileNet(width=0.25, num_classes=5, stem_stride=1)
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 5])

    Args:
        stages: of inverted residual blocks, after a first block of expansion 1.
        width: factor on all channels, which stay multiples of 8.
        dropout: before the classifier.
        stem_stride: 2 for ImageNet; 1 for 32×32 images.

    Shapes: float [N, in_channels, H, W] → [N, num_classes].
    """

    def __init__(
        self,
        stages: tuple[Stage, ...] = PIXEL1_STAGES,
        width: float = 1.0,
        dropout: float = 0.1,
        stem_stride: int = 2,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        first, last, features = (_divisible(width * c) for c in (24, 1152, 1536))
        self.stem = nn.Sequential(*_conv_bn(in_channels, first, 3, stem_stride), nn.Hardswish())
        self.blocks = nn.ModuleList([InvertedResidual(first, first, 1, 3, 1, nn.ReLU)])
        inputs = first
        for stage in stages:
            outputs = _divisible(width * stage.channels)
            act = nn.Hardswish if stage.hard_swish else nn.ReLU
            for i, (expansion, kernel) in enumerate(zip(stage.expansions, stage.kernels, strict=True)):
                stride = stage.stride if i == 0 else 1
                block = InvertedResidual(inputs, outputs, expansion, kernel, stride, act, stage.squeeze)
                self.blocks.append(block)
                inputs = outputs
        self.final = nn.Sequential(*_conv_bn(inputs, last, 1), nn.Hardswish())
        self.mix = nn.Sequential(nn.Conv2d(last, features, 1, bias=False), nn.Hardswish())
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.final(x).mean(dim=(2, 3), keepdim=True)
        return self.linear(self.dropout(self.mix(x).flatten(1)))


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def _divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple of `by`, but not less than 90 % of `channels`."""
    nearest = max(by, int(channels + by / 2) // by * by)
    return nearest + by if nearest < 0.9 * channels else nearest
