"""The network of NAS-Bench-201 (Dong & Yang, 2020): cells at three widths, with a residual block between.

Source: the published definition.
Known: cells, channels, hence sizes.

| network                                        | parameters | known     |
| ---------------------------------------------- | ---------- | --------- |
| 5 cells a stage, 16 channels, search, scalars  | 1,692,878  | 1,692,878 |

In the search network, convolutions have a bias and the norms behind them no scale and shift.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from espalier.models.darts import CellBase, Edges
from espalier.models.operations import relu_conv_bn

__all__ = ["OPERATIONS", "NASBench201"]

OPERATIONS = ("skip", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


class DenseCell(CellBase):
    """One input and three nodes; the last node is the output: [N, C, H, W] → the same.

    >>> DenseCell(4, OPERATIONS)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 4, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        operations: Sequence[str] | Edges,
        nodes: int = 3,
        affine: bool = False,
        scalars: bool = False,
    ) -> None:
        super().__init__("normal", 1, nodes, channels)
        self.add_edges(operations, 0, affine, pool_norm=False, scalars=scalars)

    def forward(self, x: Tensor) -> Tensor:
        last = self.run([x])[-1]
        return torch.zeros_like(x) if last is None else last


class Reduction(nn.Module):
    """A residual block of stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.first = nn.Sequential(nn.ReLU(), first, nn.BatchNorm2d(outputs))
        self.second = relu_conv_bn(outputs, outputs, affine=True, kernel=3)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x))


class NASBench201(nn.Module):
    """Stem, three stages of cells of C, 2C and 4C channels, classifier.

    >>> NASBench201(channels=4, cells=1)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 10])

    Args:
        channels: of the first stage. cells: of each stage. nodes: of a cell, the input aside.
        operations: names of what lies on every edge; or, for "normal" cells, a mapping of edges ("0_1": from
            the input to the first node) to names.
        affine: as in the networks that are trained for themselves; the search network has none.
        scalars: a trainable number behind every pool and skip.

    Shapes: float [N, in_channels, H, W] → [N, num_classes], H and W divisible by 4.
    """

    def __init__(
        self,
        channels: int = 16,
        cells: int = 5,
        nodes: int = 3,
        operations: Sequence[str] | Mapping[str, Edges] = OPERATIONS,
        affine: bool = False,
        in_channels: int = 3,
        num_classes: int = 10,
        scalars: bool = False,
    ) -> None:
        super().__init__()
        own = operations["normal"] if isinstance(operations, Mapping) else operations
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.cells = nn.ModuleList()
        for stage in range(3):
            if stage:
                self.cells.append(Reduction(channels, 2 * channels))
                channels *= 2
            self.cells.extend(DenseCell(channels, own, nodes, affine, scalars) for _ in range(cells))
        self.norm = nn.BatchNorm2d(channels, affine=affine)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return self.linear(torch.relu(self.norm(x)).mean(dim=(2, 3)))
