"""DemoNet, the small network of figure 2 of ASGSSD (section 3 and Table 1).

Source: the paper's figure 2 shows the graph; channels and strides are not published.
Known: the eight convolutions with bias and batch norm, their connections, and the sizes of Table 1.
Reconstructed: channels and strides, chosen to meet both rows of that table (3×32×32, FLOPs = 2 × MACs).

| network                   | parameters | paper  | FLOPs    | paper |
| ------------------------- | ---------- | ------ | -------- | ----- |
| full                      | 818,442    | 0.82 M | 209.98 M | 209 M |
| without conv2, 3, conv8   | 449,034    | 0.45 M | 106.17 M | 107 M |
"""

import torch
from torch import Tensor, nn

__all__ = ["DemoNet"]


class DemoNet(nn.Module):
    """Three branches that are concatenated, then two that are added, then a linear classifier.

    ```
                ┌─ conv2 ───────────────────┐             ┌─ conv7 ─┐
    x ─ conv1 ──┼─ max pool ─ conv3 ────────┼─ concat ─ conv6       add ─ mean ─ linear
                └─ avg pool ─ conv4 ─ conv5 ┘             └─ conv8 ─┘
    ```

    >>> model = DemoNet(width=0.25, in_channels=1)
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])

    Args:
        width: factor on all hidden channels; 1 is the paper's size, and a channel count is never below 1.
        in_channels: channels of the images.
        num_classes: length of the output.

    Shapes: float [N, in_channels, H, W] → [N, num_classes], with even H and W.
    """

    def __init__(self, width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width is a positive factor on the channels, not {width}")
        c1, c2, c3, c4, c5, c6, c7 = (max(1, round(width * c)) for c in (128, 64, 64, 32, 256, 96, 128))
        self.conv1 = nn.Conv2d(in_channels, c1, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(c2)
        self.maxpool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(c1, c3, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(c3)
        self.avgpool = nn.AvgPool2d(2)
        self.conv4 = nn.Conv2d(c1, c4, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(c4)
        self.conv5 = nn.Conv2d(c4, c5, 3, padding=1)
        self.bn5 = nn.BatchNorm2d(c5)
        self.conv6 = nn.Conv2d(c2 + c3 + c5, c6, 3, stride=2, padding=1)
        self.bn6 = nn.BatchNorm2d(c6)
        self.conv7 = nn.Conv2d(c6, c7, 3, padding=1)
        self.bn7 = nn.BatchNorm2d(c7)
        self.conv8 = nn.Conv2d(c6, c7, 3, padding=1)
        self.bn8 = nn.BatchNorm2d(c7)
        self.linear = nn.Linear(c7, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        a = torch.relu(self.bn2(self.conv2(x)))
        b = torch.relu(self.bn3(self.conv3(self.maxpool(x))))
        c = torch.relu(self.bn4(self.conv4(self.avgpool(x))))
        c = torch.relu(self.bn5(self.conv5(c)))
        x = torch.cat([a, b, c], dim=1)
        x = torch.relu(self.bn6(self.conv6(x)))
        x = torch.relu(self.bn7(self.conv7(x))) + torch.relu(self.bn8(self.conv8(x)))
        return self.linear(x.mean(dim=(2, 3)))
