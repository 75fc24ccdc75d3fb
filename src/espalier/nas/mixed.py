"""Edges weighted by architecture parameters: DARTS (Liu et al., 2018) and PC-DARTS (Xu et al., 2020)."""

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from espalier.models.darts import CellBase
from espalier.models.operations import operation
from espalier.nas.genotype import Genotype
from espalier.nas.space import CellSpace
from espalier.nas.supernet import cells_of


class Architecture(nn.Module):
    """The architecture parameters of all cells of one kind.

    ``operations[edge]`` [operations] are the logits α of what lies on an edge, `none` included where the space
    has it; ``edges[edge]`` [] those of the edge itself (β, of PC-DARTS alone).
    """

    def __init__(self, within: CellSpace, kind: str, partial: bool, generator: torch.Generator) -> None:
        super().__init__()
        own = within.edges(kind)
        self.names = dict(own)
        self.operations = nn.ParameterDict({e: 1e-3 * torch.randn(len(n), generator=generator) for e, n in own.items()})
        beta = {e: 1e-3 * torch.randn((), generator=generator) for e in own} if partial else {}
        self.edges = nn.ParameterDict(beta)

    def weights(self, edge: str) -> Tensor:
        """Softmax of α, times the edge's share among those into the same node where there is a β."""
        weights = torch.softmax(self.operations[edge], 0)
        if not len(self.edges):
            return weights
        node = edge.split("_")[1]
        into = [e for e in self.names if e.split("_")[1] == node]
        shares = torch.softmax(torch.stack([self.edges[e] for e in into]), 0)
        return weights * shares[into.index(edge)]


class Mixed(nn.Module):
    """All operations of one edge, weighted; of 1/``part`` of the channels, where the rest goes straight on."""

    def __init__(
        self, architecture: Architecture, edge: str, channels: int, stride: int, part: int = 1, pool_norm: bool = True
    ) -> None:
        super().__init__()
        self._architecture = [architecture]  # in a list: its parameters are not this module's
        self.edge, self.stride, self.part = edge, stride, part
        self.chosen: tuple[str, ...] = ()
        self.ops = nn.ModuleList(
            nn.Identity() if name == "none" else operation(name, channels // part, stride, pool_norm=pool_norm)
            for name in architecture.names[edge]
        )

    def forward(self, x: Tensor) -> Tensor:
        names = self._architecture[0].names[self.edge]
        weights = self._architecture[0].weights(self.edge)
        active = x[:, : x.shape[1] // self.part]
        if self.chosen:
            out = sum(self.ops[names.index(name)](active) for name in self.chosen)
        else:
            out = sum(weights[i] * op(active) for i, op in enumerate(self.ops) if names[i] != "none")
        assert isinstance(out, Tensor)
        if self.part == 1:
            return out
        rest = x[:, x.shape[1] // self.part :]
        if self.stride == 2:
            rest = max_pool2d(rest, 2, 2)
        whole = torch.cat([out, rest], dim=1)
        count, channels, height, width = whole.shape
        return whole.view(count, self.part, -1, height, width).transpose(1, 2).reshape(count, channels, height, width)


def mix(network: nn.Module, within: CellSpace, part: int = 1, seed: int = 0) -> nn.ModuleDict:
    """Put weighted edges into every cell of a supernet, in place; returns the architecture parameters by kind.

    ``part``: PC-DARTS's K, the fraction of the channels that pass through the operations; 1 for DARTS.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = {kind: Architecture(within, kind, part > 1, generator) for kind in within.kinds}
    for cell in cells_of(network).values():
        own = kinds[cell.kind]
        cell.edges = nn.ModuleDict(
            {e: nn.ModuleDict({"mixed": _mixed(cell, own, e, within, part)}) for e in own.names if _any(own.names[e])}
        )
    return nn.ModuleDict(kinds)


def _mixed(cell: CellBase, own: Architecture, edge: str, within: CellSpace, part: int) -> Mixed:
    stride = 2 if cell.kind == "reduce" and int(edge.split("_")[0]) < within.inputs else 1
    return Mixed(own, edge, cell.channels, stride, part, within.stacking == "darts")


def _any(names: Sequence[str]) -> bool:
    return any(name != "none" for name in names)


def discretise(network: nn.Module, found: Genotype) -> None:
    """Leave only what was chosen in a supernet with weighted edges, with the weight 1, in place."""
    for cell in cells_of(network).values():
        for edge in list(cell.edges):
            chosen = found.edges(cell.kind).get(edge, ())
            if chosen:
                cell.edges[edge]["mixed"].chosen = tuple(chosen)  # type: ignore[index]
            else:
                del cell.edges[edge]


@torch.no_grad()
def strengths(kinds: Mapping[str, nn.Module] | nn.ModuleDict) -> dict[str, float]:
    """The weight of every operation but `none`: "kind.edge.operation" → a number in (0, 1)."""
    found = {}
    for kind, own in kinds.items():
        assert isinstance(own, Architecture)
        for edge, names in own.names.items():
            for name, weight in zip(names, own.weights(edge).tolist(), strict=True):
                if name != "none" and isfinite(weight):
                    found[f"{kind}.{edge}.{name}"] = weight
    return found


def strongest(within: CellSpace, strength: Mapping[str, float], top: int = 2) -> Genotype:
    """The strongest operation of the ``top`` strongest edges into each node (DARTS); of all edges in
    NAS-Bench-201's cells.
    """
    from espalier.nas.gs_nas import best_per_node

    everything = Genotype.of(
        within,
        {k: {e: [n for n in names if n != "none"] for e, names in within.edges(k).items()} for k in within.kinds},
    )
    return best_per_node(within, everything, strength, top if within.stacking == "darts" else 99)
