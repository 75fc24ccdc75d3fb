"""SuperResNet: residual blocks with 3×3, 5×5 and 7×7 candidates side by side (ASGSSD, Table 2).

Source: ASGSSD says that blocks with these three kernels in parallel are stacked to varying depths, and that
the network found by ZenNAS (Lin et al., 2021) is inside.
Known: that network for CIFAR-10 at 2 M parameters, published as stages of 1×1, k×k, 1×1 blocks with kernels
5, 5, 7, 3, 3, 5, 3.
Ours: its widths, bottlenecks, strides and depths, with every kernel in every block. A block all of whose
candidates go is skipped by its identity, so that depth is searched too.

| network                             | parameters | paper     | MACs, 3×32×32 |
| ----------------------------------- | ---------- | --------- | ------------- |
| full, 36 blocks, 108 candidates     | 8,903,194  | not given | 2,080.7 M     |
| only ZenNAS's kernel in each stage  | 1,949,274  | 2.0 M     | 473.5 M       |
| full, `width=0.25`                  | 569,242    |           | 130.2 M       |
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ZEN_STAGES", "SuperBlock", "SuperResNet", "SuperStage"]


@dataclass(frozen=True)
class SuperStage:
    """Blocks of one shape: output channels, channels inside, stride of the first block, number, kernels."""

    width: int
    bottleneck: int
    stride: int
    depth: int
    kernels: tuple[int, ...] = (3, 5, 7)


ZEN_STAGES = (
    SuperStage(120, 40, 1, 2),
    SuperStage(176, 32, 2, 6),
    SuperStage(272, 24, 1, 6),
    SuperStage(176, 56, 1, 6),
    SuperStage(176, 64, 1, 8),
    SuperStage(216, 40, 2, 4),
    SuperStage(72, 56, 2, 4),
)


class SuperBlock(nn.Module):
    """Shortcut plus one 1×1, k×k, 1×1 branch per kernel.

    >>> SuperBlock(8, 16, 4, stride=2, kernels=(3, 5))(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 16, 3, 3])
    """

    def __init__(
        self, inputs: int, outputs: int, bottleneck: int, stride: int = 1, kernels: Sequence[int] = (3, 5, 7)
    ) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict(
            {f"k{kernel}": _candidate(inputs, outputs, bottleneck, stride, kernel) for kernel in kernels}
        )
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(*_conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.shortcut(x)
        for candidate in self.candidates.values():
            y = y + candidate(x)
        return torch.relu(y)


class SuperResNet(nn.Module):
    """Stem, stages of super-residual blocks, a last 1×1 convolution, mean, linear.

    >>> SuperResNet(width=0.1)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 10])

    Args:
        stages: their widths, depths, strides and kernels.
        width: factor on all hidden channels.

    Shapes: float [N, in_channels, H, W] → [N, num_classes].
    """

    def __init__(
        self,
        stages: Sequence[SuperStage] = ZEN_STAGES,
        width: float = 1.0,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        inputs, last = (max(1, round(width * c)) for c in (32, 512))
        self.stem = nn.Sequential(*_conv_bn(in_channels, inputs, 3), nn.ReLU())
        self.blocks = nn.ModuleList()
        for stage in stages:
            outputs, inner = (max(1, round(width * c)) for c in (stage.width, stage.bottleneck))
            for i in range(stage.depth):
                stride = stage.stride if i == 0 else 1
                self.blocks.append(SuperBlock(inputs, outputs, inner, stride, stage.kernels))
                inputs = outputs
        self.last = nn.Sequential(*_conv_bn(inputs, last, 1), nn.ReLU())
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.linear(self.last(x).mean(dim=(2, 3)))


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def _candidate(inputs: int, outputs: int, bottleneck: int, stride: int, kernel: int) -> nn.Sequential:
    names = ("conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3", "bn3")
    layers = (
        *_conv_bn(inputs, bottleneck, 1),
        nn.ReLU(),
        *_conv_bn(bottleneck, bottleneck, kernel, stride),
        nn.ReLU(),
        *_conv_bn(bottleneck, outputs, 1),
    )
    return nn.Sequential(OrderedDict(zip(names, layers, strict=True)))
