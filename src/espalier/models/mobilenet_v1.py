"""MobileNetV1 (Howard et al., 2017), the network of CHITA's ImageNet experiments.

| network | parameters | convolution and linear weights |
| ------- | ---------- | ------------------------------ |
| full    | 4,231,976  | 4,209,088                      |
"""

from torch import Tensor, nn

__all__ = ["MobileNetV1"]

# Output channels and stride of each depthwise separable block.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """Thirteen depthwise separable blocks; input [batch, 3, height, width], output [batch, classes].

    >>> sum(p.numel() for p in MobileNetV1().parameters())
    4231976
    """

    def __init__(self, classes: int = 1000):
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, 32, 3, 2)]
        width = 32
        for channels, stride in _BLOCKS:
            layers += [_convolution(width, width, 3, stride, groups=width), _convolution(width, channels, 1)]
            width = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
