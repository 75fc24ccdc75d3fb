"""The DARTS network with every operation on every edge (Liu et al., 2018; ASGSSD, Tables 3 and 5).

Source: the published definition of the search network.
Known: operations, cells and channels, hence exact sizes.
Ours: the outputs of an edge's operations are summed without architecture weights, as ASGSSD (appendix A.2)
and GSparsity do; the operation `none` would add nothing to that sum and is left out. The channels of the
paper's networks are not published.

| network                                  | parameters | known     | MACs, input         | paper            |
| ---------------------------------------- | ---------- | --------- | ------------------- | ---------------- |
| 8 cells, 16 channels                     | 1,930,618  | 1,930,618 | 300.3 M, 3×32×32    |                  |
| 8 cells, 24 channels, affine             | 4,083,058  |           | 600.0 M, 3×32×32    | 4.05 M and 614 M |
| 14 cells, 16 channels                    | 3,239,674  |           | 526.8 M, 3×32×32    |                  |
| 14 cells, 48 channels, ImageNet's stem   | 25,247,584 |           | 2,835 M, 3×224×224  | not given        |

The paper's 4.05 M and 614 M are of "DARTS (8 cells)" on STL-10; its input size is not given.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

__all__ = ["DARTS", "OPERATIONS", "Cell", "FactorizedReduce", "operation"]


class FactorizedReduce(nn.Module):
    """Halves height and width: two 1×1 convolutions of stride 2, on even and on odd pixels, concatenated.

    >>> FactorizedReduce(4, 8)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, affine: bool = False) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return self.bn(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))


def _relu_conv_bn(inputs: int, outputs: int, affine: bool) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(outputs, affine=affine))


def _depthwise(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def _separable(channels: int, kernel: int, stride: int, affine: bool) -> nn.Module:
    twice = _depthwise(channels, kernel, stride, 1, affine) + _depthwise(channels, kernel, 1, 1, affine)
    return nn.Sequential(*twice)


def _dilated(channels: int, kernel: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(*_depthwise(channels, kernel, stride, 2, affine))


def _pool(pool: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False))


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


_MAKE: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "max_pool_3x3": lambda c, s, affine: _pool(nn.MaxPool2d(3, s, 1), c),
    "avg_pool_3x3": lambda c, s, affine: _pool(nn.AvgPool2d(3, s, 1, count_include_pad=False), c),
    "skip": _skip,
    "sep_conv_3x3": lambda c, s, affine: _separable(c, 3, s, affine),
    "sep_conv_5x5": lambda c, s, affine: _separable(c, 5, s, affine),
    "dil_conv_3x3": lambda c, s, affine: _dilated(c, 3, s, affine),
    "dil_conv_5x5": lambda c, s, affine: _dilated(c, 5, s, affine),
}
OPERATIONS = tuple(_MAKE)


def operation(name: str, channels: int, stride: int = 1, affine: bool = False) -> nn.Module:
    """One of OPERATIONS, keeping the channels.

    >>> operation("dil_conv_5x5", 8, stride=2)(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """
    if name not in _MAKE:
        raise ValueError(f"{name!r} is no operation of DARTS; there are {', '.join(OPERATIONS)}")
    return _MAKE[name](channels, stride, affine)


class Cell(nn.Module):
    """Four nodes; each sums every operation on the edges from all earlier nodes and the two inputs.

    >>> cell = Cell((8, 16), 4, reduction=True, reduction_before=False)
    >>> cell(torch.zeros(1, 8, 6, 6), torch.zeros(1, 16, 6, 6)).shape
    torch.Size([1, 16, 3, 3])

    Returns the nodes concatenated: [N, nodes * channels, H, W], or half the size where `reduction`.
    """

    def __init__(
        self,
        inputs: tuple[int, int],
        channels: int,
        reduction: bool,
        reduction_before: bool,
        operations: Sequence[str] = OPERATIONS,
        nodes: int = 4,
        affine: bool = False,
    ) -> None:
        super().__init__()
        narrow = FactorizedReduce if reduction_before else _relu_conv_bn
        self.preprocess0 = narrow(inputs[0], channels, affine)
        self.preprocess1 = _relu_conv_bn(inputs[1], channels, affine)
        self.edges = nn.ModuleDict()
        for node in range(2, 2 + nodes):
            for source in range(node):
                stride = 2 if reduction and source < 2 else 1
                ops = {name: operation(name, channels, stride, affine) for name in operations}
                self.edges[f"{source}_{node}"] = nn.ModuleDict(ops)
        self.nodes = nodes

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [self.preprocess0(before), self.preprocess1(last)]
        for node in range(2, 2 + self.nodes):
            edges = [(x, self.edges[f"{source}_{node}"]) for source, x in enumerate(states)]
            states.append(reduce(torch.add, [op(x) for x, edge in edges for op in edge.children()]))
        return torch.cat(states[2:], dim=1)


class DARTS(nn.Module):
    """Stem, cells (the ones at a third and two thirds halve the size and double the channels), classifier.

    >>> DARTS(channels=4, cells=3)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 10])

    Args:
        channels: of the first cells' nodes. cells: how many. nodes: of one cell.
        operations: names of what lies on every edge.
        affine: scale and shift in the cells' batch norms (never in the pools'); the search network has none.
        stem: "cifar" keeps the size; "imagenet" divides it by eight, as published for ImageNet.

    Shapes: float [N, in_channels, H, W] → [N, num_classes], H and W divisible by 4, or 32 for ImageNet.
    """

    def __init__(
        self,
        channels: int = 16,
        cells: int = 8,
        nodes: int = 4,
        operations: Sequence[str] = OPERATIONS,
        affine: bool = False,
        stem: str = "cifar",
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem is 'cifar' or 'imagenet', not {stem!r}")
        imagenet = stem == "imagenet"
        width = channels if imagenet else 3 * channels
        self.stem = _imagenet_stem(in_channels, width) if imagenet else _stem(in_channels, width)
        self.stem1 = _imagenet_stem1(width) if imagenet else None
        inputs, reduced = (width, width), imagenet
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduction = i in (cells // 3, 2 * cells // 3)
            channels *= 2 if reduction else 1
            self.cells.append(Cell(inputs, channels, reduction, reduced, operations, nodes, affine))
            inputs, reduced = (inputs[1], nodes * channels), reduction
        self.linear = nn.Linear(inputs[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        before = self.stem(x)
        last = before if self.stem1 is None else self.stem1(before)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.linear(last.mean(dim=(2, 3)))


def _stem(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))


def _imagenet_stem(inputs: int, outputs: int) -> nn.Sequential:
    first = nn.Conv2d(inputs, outputs // 2, 3, stride=2, padding=1, bias=False)
    second = nn.Conv2d(outputs // 2, outputs, 3, stride=2, padding=1, bias=False)
    norm = nn.BatchNorm2d(outputs // 2)
    return nn.Sequential(first, norm, nn.ReLU(), second, nn.BatchNorm2d(outputs))


def _imagenet_stem1(channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(channels))
