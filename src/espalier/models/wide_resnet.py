"""Wide residual networks for 32 × 32 images (Zagoruyko & Komodakis, 2016), of Table 3 of L0-ARM."""

import torch
from torch import Tensor, nn

__all__ = ["WideResNet"]


class WideBlock(nn.Module):
    """Norm, ReLU, convolution, twice, and a shortcut, which is a 1 × 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(torch.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """Three stages of ``(depth - 4) / 6`` blocks of 16, 32 and 64 times ``width`` channels.

    >>> WideResNet(16, 2)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in WideResNet(28, 10).parameters())
    36479194

    Shapes: float [N, 3, 32, 32] → [N, classes]. ValueError for a depth that is not 6 n + 4.
    """

    def __init__(self, depth: int = 28, width: int = 10, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth}: it is 6 n + 4, 10 at least.")
        count, widths = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*(WideBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1)
                                for i in range(count)))
                for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
            )
        )  # fmt: skip
        self.bn, self.fc = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        assert self.fc.bias is not None
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stages(self.conv1(x))))
        return self.fc(x.mean((2, 3)))
