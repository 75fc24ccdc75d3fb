"""A space of cells as data: the operations on every edge, how edges are wired, and how cells are stacked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from espalier.errors import SpaceError
from espalier.models.darts import DARTS
from espalier.models.nas_bench_201 import NASBench201
from espalier.models.operations import NAMES

Edges = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Stacking:
    """How cells become a network.

    ``kinds``: cells that differ; ``inputs``: of a cell; ``every_node``: a cell's output is all of its nodes
    (else the last one); ``network``: the class that stacks them; ``reduction_at_cell``: a cell's input may be
    halved within it.
    """

    kinds: tuple[str, ...]
    inputs: int
    every_node: bool
    network: type[nn.Module]


STACKINGS = {
    "darts": Stacking(("normal", "reduce"), 2, True, DARTS),
    "nas-bench-201": Stacking(("normal",), 1, False, NASBench201),
}


@dataclass(frozen=True)
class CellSpace:
    """What may lie on every edge of every kind of cell.

    >>> tiny = uniform("tiny", ("skip", "sep_conv_3x3"), nodes=2)
    >>> tiny.edges("normal")["0_2"], len(tiny.edges("reduce"))
    (('skip', 'sep_conv_3x3'), 5)
    >>> sum(p.numel() for p in tiny.supernet(channels=4, cells=3).parameters())
    8493

    Fields:
        name: for genotypes and messages.
        cells: per kind of cell, per edge ("0_2": from state 0 to state 2; the inputs come first) the names
            of its operations.
        nodes: of a cell, its inputs aside.
        stacking: "darts" (two inputs; normal and reduction cells; the nodes are concatenated) or
            "nas-bench-201" (one input; the last node is the output).

    Raises :class:`SpaceError` for an edge without operations, an unknown operation, an edge that does not
    exist, and a kind of cell that is missing.
    """

    name: str
    cells: Mapping[str, Edges]
    nodes: int = 4
    stacking: str = "darts"

    def __post_init__(self) -> None:
        if self.stacking not in STACKINGS:
            raise SpaceError(f"space '{self.name}': no stacking '{self.stacking}'; there are {', '.join(STACKINGS)}.")
        kinds = STACKINGS[self.stacking].kinds
        if set(self.cells) != set(kinds):
            raise SpaceError(f"space '{self.name}' describes {sorted(self.cells)} cells; it needs {list(kinds)}.")
        for kind, edges in self.cells.items():
            possible = set(self.possible_edges())
            for edge, operations in edges.items():
                where = f"space '{self.name}', {kind} cell, edge {edge}"
                if edge not in possible:
                    raise SpaceError(f"{where}: there is no such edge; there are {', '.join(sorted(possible))}.")
                if not operations:
                    raise SpaceError(f"{where} is empty: give it an operation, or leave the edge out.")
                check_operations(operations, where)

    @property
    def inputs(self) -> int:
        return STACKINGS[self.stacking].inputs

    @property
    def kinds(self) -> tuple[str, ...]:
        return STACKINGS[self.stacking].kinds

    def edges(self, kind: str) -> Edges:
        """Operations per edge of one kind of cell."""
        return self.cells[kind]

    def possible_edges(self) -> Iterator[str]:
        """Every edge of a cell of this wiring, node by node."""
        for node in range(self.inputs, self.inputs + self.nodes):
            for source in range(node):
                yield f"{source}_{node}"

    def choices(self) -> Iterator[tuple[str, str, str]]:
        """Every (kind, edge, operation); `none`, which adds nothing, aside."""
        for kind in self.kinds:
            for edge, operations in self.edges(kind).items():
                yield from ((kind, edge, name) for name in operations if name != "none")

    def supernet(
        self, channels: int = 16, cells: int = 8, num_classes: int = 10, in_channels: int = 3, scalars: bool = True
    ) -> nn.Module:
        """The network with every operation on every edge, summed.

        ``scalars``: a trainable number behind every operation without weights, so that it can be driven to
        zero as well. ``cells`` is of each of the three stages where the stacking is NAS-Bench-201's.
        """
        return self.network(
            {kind: self.edges(kind) for kind in self.kinds}, channels, cells, num_classes, in_channels, scalars=scalars
        )

    def network(
        self,
        operations: Mapping[str, Edges],
        channels: int,
        cells: int,
        num_classes: int = 10,
        in_channels: int = 3,
        **options: Any,
    ) -> nn.Module:
        """The stacked network with these operations; ``options`` are those of the stacking's network."""
        return STACKINGS[self.stacking].network(
            channels=channels,
            cells=cells,
            nodes=self.nodes,
            operations=operations,
            num_classes=num_classes,
            in_channels=in_channels,
            **options,
        )


def uniform(name: str, operations: Sequence[str], nodes: int = 4, stacking: str = "darts") -> CellSpace:
    """The space with the same operations on every edge of every cell.

    >>> uniform("mine", ("skip", "max_pool_3x3"), nodes=1).edges("normal")
    {'0_2': ('skip', 'max_pool_3x3'), '1_2': ('skip', 'max_pool_3x3')}
    """
    if stacking not in STACKINGS:
        raise SpaceError(f"space '{name}': no stacking '{stacking}'; there are {', '.join(STACKINGS)}.")
    inputs = STACKINGS[stacking].inputs
    edges = {f"{s}_{n}": tuple(operations) for n in range(inputs, inputs + nodes) for s in range(n)}
    return CellSpace(name, dict.fromkeys(STACKINGS[stacking].kinds, edges), nodes, stacking)


def check_operations(operations: Sequence[str], where: str) -> None:
    """Raise :class:`SpaceError` for a name that is no operation, or comes twice."""
    for name in operations:
        if name not in NAMES:
            raise SpaceError(f"{where}: unknown operation '{name}'; there are {', '.join(NAMES)}.")
    if len(set(operations)) < len(operations):
        raise SpaceError(f"{where} names an operation twice: {', '.join(operations)}.")
