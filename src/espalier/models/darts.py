"""The network of DARTS: cells whose nodes sum what lies on their edges (Liu et al., 2018; ASGSSD, Tables 3 and 5).

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

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from espalier.models.operations import OPERATIONS, FactorizedReduce, drop_path, operation, relu_conv_bn

__all__ = ["DARTS", "OPERATIONS", "Cell", "CellBase", "FactorizedReduce", "operation"]

Edges = Mapping[str, Sequence[str]]
"""What lies on each edge, "source_node" → names of operations; an edge that is not there has nothing."""


class CellBase(nn.Module):
    """Nodes in a row, each the sum of all operations on the edges from earlier ones. `edges` holds them all.

    `kind` names cells that share their design. `drop_path` is the probability with which an operation other
    than the identity is dropped in training.
    """

    def __init__(self, kind: str, inputs: int, nodes: int, channels: int) -> None:
        super().__init__()
        self.kind, self.inputs, self.nodes, self.channels = kind, inputs, nodes, channels
        self.drop_path = 0.0

    def add_edges(
        self, operations: Sequence[str] | Edges, strided: int, affine: bool, pool_norm: bool, scalars: bool
    ) -> None:
        """Make the operations; those on edges from the first ``strided`` inputs halve the size."""
        self.edges = nn.ModuleDict()
        for node in range(self.inputs, self.inputs + self.nodes):
            for source in range(node):
                key = f"{source}_{node}"
                names = operations.get(key, ()) if isinstance(operations, Mapping) else operations
                stride = 2 if source < strided else 1
                ops = {
                    name: operation(name, self.channels, stride, affine, pool_norm, scalars)
                    for name in names
                    if name != "none"
                }
                if ops:
                    self.edges[key] = nn.ModuleDict(ops)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The inputs and every node; None for a node that nothing leads to."""
        states: list[Tensor | None] = list(inputs)
        for node in range(self.inputs, self.inputs + self.nodes):
            terms = []
            for source, x in enumerate(states):
                if x is not None and f"{source}_{node}" in self.edges:
                    terms += self.on_edge(f"{source}_{node}", x)
            states.append(reduce(torch.add, terms) if terms else None)
        return states

    def on_edge(self, key: str, x: Tensor) -> list[Tensor]:
        """What the operations on one edge make of its source."""
        if not (self.training and self.drop_path > 0.0):
            return [op(x) for op in self.edges[key].children()]
        return [
            op(x) if isinstance(op, nn.Identity) else drop_path(op(x), self.drop_path)
            for op in self.edges[key].children()
        ]


class Cell(CellBase):
    """Four nodes; each sums every operation on the edges from all earlier nodes and the two inputs.

    >>> cell = Cell((8, 16), 4, reduction=True, reduction_before=False)
    >>> cell(torch.zeros(1, 8, 6, 6), torch.zeros(1, 16, 6, 6)).shape
    torch.Size([1, 16, 3, 3])

    ``operations``: names of what lies on every edge, or a mapping of edges ("0_2": from the first input to
    the first node) to names; nodes that no operation leads to are then left out of the output.

    Returns the nodes concatenated: [N, nodes * channels, H, W], or half the size where `reduction`.
    """

    def __init__(
        self,
        inputs: tuple[int, int],
        channels: int,
        reduction: bool,
        reduction_before: bool,
        operations: Sequence[str] | Edges = OPERATIONS,
        nodes: int = 4,
        affine: bool = False,
        pool_norm: bool = True,
        scalars: bool = False,
    ) -> None:
        super().__init__("reduce" if reduction else "normal", 2, nodes, channels)
        narrow = FactorizedReduce if reduction_before else relu_conv_bn
        self.preprocess0 = narrow(inputs[0], channels, affine)
        self.preprocess1 = relu_conv_bn(inputs[1], channels, affine)
        self.add_edges(operations, 2 if reduction else 0, affine, pool_norm, scalars)
        self.outputs = tuple(n for n in range(2, 2 + nodes) if any(k.endswith(f"_{n}") for k in self.edges))

    @property
    def width(self) -> int:
        """Channels of the output."""
        return len(self.outputs) * self.channels

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = self.run([self.preprocess0(before), self.preprocess1(last)])
        nodes = [states[i] for i in self.outputs]
        return torch.cat([x if x is not None else self._nothing(before, last) for x in nodes], dim=1)

    def _nothing(self, before: Tensor, last: Tensor) -> Tensor:
        """A node whose every operation was taken out while the network runs."""
        height, width = last.shape[2:]
        if self.kind == "reduce":
            height, width = (height + 1) // 2, (width + 1) // 2
        return last.new_zeros(len(last), self.channels, height, width)


class DARTS(nn.Module):
    """Stem, cells (the ones at a third and two thirds halve the size and double the channels), classifier.

    >>> DARTS(channels=4, cells=3)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 10])

    Args:
        channels: of the first cells' nodes. cells: how many. nodes: of one cell.
        operations: names of what lies on every edge; or, for "normal" and "reduce" cells, a mapping of edges
            to names.
        affine: scale and shift in the cells' batch norms (never in the pools'); the search network has none.
        stem: "cifar" keeps the size; "imagenet" divides it by eight, as published for ImageNet.
        pool_norm: a batch norm after every pool; the evaluation network has none.
        scalars: a trainable number behind every pool, skip and noise.
        auxiliary: a second classifier at two thirds, for images of 32×32 (or 224×224 with ImageNet's stem).
            In train mode the network then returns both.

    Shapes: float [N, in_channels, H, W] → [N, num_classes], H and W divisible by 4, or 32 for ImageNet.
    """

    def __init__(
        self,
        channels: int = 16,
        cells: int = 8,
        nodes: int = 4,
        operations: Sequence[str] | Mapping[str, Edges] = OPERATIONS,
        affine: bool = False,
        stem: str = "cifar",
        in_channels: int = 3,
        num_classes: int = 10,
        pool_norm: bool = True,
        scalars: bool = False,
        auxiliary: bool = False,
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
        self.auxiliary_at = 2 * cells // 3 if auxiliary else -1
        self.auxiliary: nn.Module | None = None
        for i in range(cells):
            reduction = i in (cells // 3, 2 * cells // 3)
            channels *= 2 if reduction else 1
            own = operations["reduce" if reduction else "normal"] if isinstance(operations, Mapping) else operations
            cell = Cell(inputs, channels, reduction, reduced, own, nodes, affine, pool_norm, scalars)
            self.cells.append(cell)
            inputs, reduced = (inputs[1], cell.width), reduction
            if i == self.auxiliary_at:
                self.auxiliary = _auxiliary(inputs[1], num_classes, imagenet)
        self.linear = nn.Linear(inputs[1], num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        before = self.stem(x)
        last = before if self.stem1 is None else self.stem1(before)
        second = None
        for i, cell in enumerate(self.cells):
            before, last = last, cell(before, last)
            if i == self.auxiliary_at and self.training and self.auxiliary is not None:
                second = self.auxiliary(last)
        logits = self.linear(last.mean(dim=(2, 3)))
        return logits if second is None else (logits, second)


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


def _auxiliary(channels: int, num_classes: int, imagenet: bool) -> nn.Sequential:
    """Takes 8×8 (ImageNet: 7×7) to one pixel; for ImageNet the published head lacks its second norm."""
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride=2 if imagenet else 3, count_include_pad=False),
        nn.Conv2d(channels, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),
        nn.Identity() if imagenet else nn.BatchNorm2d(768),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(768, num_classes),
    )
