"""Groups of a supernet's operations, what they say about its cells, and taking operations out of it."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.models.darts import CellBase
from espalier.models.operations import Scaled
from espalier.nas.genotype import Genotype
from espalier.nas.space import CellSpace
from espalier.space.search_space import SearchSpace, search_space
from espalier.space.structure import Family, Slices
from espalier.sparsify.grouping import Grouping, named_groups


def cell_key(model: nn.Module) -> Callable[[str], str]:
    """The key of GS-NAS: the same operation on the same edge in all cells of one kind is one group.

    >>> from espalier.models import DARTS
    >>> key = cell_key(DARTS(channels=4, cells=3))
    >>> key("cells.0.edges.0_2.sep_conv_3x3.1.weight")
    'normal.0_2.sep_conv_3x3'

    Takes the name of a parameter, or of a structure of the model's search space; a name outside the cells'
    edges is returned as it is.
    """
    kinds = {path: cell.kind for path, cell in cells_of(model).items()}

    def key(name: str) -> str:
        cell, found, rest = name.partition(".edges.")
        if not found or cell not in kinds:
            return name
        return ".".join((kinds[cell], *rest.split(".")[:2]))

    return key


def cells_of(model: nn.Module) -> dict[str, CellBase]:
    """The model's cells by their dotted paths."""
    return {path: cell for path, cell in model.named_modules() if isinstance(cell, CellBase)}


def operation_groups(model: nn.Module) -> Grouping:
    """One group per (kind of cell, edge, operation), from the parameters' names alone: nothing is traced.

    Raises :class:`SpaceError` for a model without cells.
    """
    key, groups = cell_key(model), {}
    for name, _ in model.named_parameters():
        if ".edges." in name:
            groups.setdefault(key(name), []).append(name)
    if not groups:
        raise SpaceError(f"{type(model).__name__} has no operations on edges of cells that could be grouped.")
    return named_groups(model, groups)


def genotype_of(within: CellSpace, alive: Iterable[str]) -> Genotype:
    """The genotype of the groups ("normal.0_2.skip") that stay.

    Raises :class:`SpaceError` where a cell has no path left.
    """
    cells: dict[str, dict[str, list[str]]] = {kind: {} for kind in within.kinds}
    for group in alive:
        kind, edge, name = group.split(".")
        cells[kind].setdefault(edge, []).append(name)
    ordered = {
        kind: {
            edge: [name for name in names if name in set(cells[kind].get(edge, ()))]
            for edge, names in within.edges(kind).items()
            if edge in cells[kind]
        }
        for kind in within.kinds
    }
    return Genotype.of(within, ordered)


def alive_groups(model: nn.Module) -> list[str]:
    """The groups whose operations the supernet still holds."""
    found = {
        f"{cell.kind}.{edge}.{name}": None
        for cell in cells_of(model).values()
        for edge, operations in cell.edges.items()
        for name, _ in operations.named_children()
    }
    return list(found)


def take_out(model: nn.Module, groups: Collection[str]) -> None:
    """Remove operations from a supernet, in place; the nodes' sums lose these terms and nothing else changes.

    Exact where their output is zero. A node that loses every operation yields zeros.
    """
    wanted = set(groups)
    for cell in cells_of(model).values():
        for edge in list(cell.edges):
            operations = cell.edges[edge]
            assert isinstance(operations, nn.ModuleDict)
            for name in list(operations):
                if f"{cell.kind}.{edge}.{name}" in wanted:
                    del operations[name]
            if not len(operations):
                del cell.edges[edge]


def stays_dead(model: nn.Module) -> set[str]:
    """The groups that cannot come back once all their parameters are zero.

    Where two or more layers lie in series, each one's gradient holds the others as factors: with all of them
    at zero it is zero, for ever. A single layer, or a trainable number, may come back.
    """
    depth: dict[str, int] = {}
    for cell in cells_of(model).values():
        for edge, operations in cell.edges.items():
            assert isinstance(operations, nn.ModuleDict)
            for name, op in operations.items():
                layers = [m for m in op.children() if isinstance(m, nn.Conv2d)] if isinstance(op, nn.Sequential) else []
                biased = any(m.bias is not None for m in layers)
                group = f"{cell.kind}.{edge}.{name}"
                depth[group] = min(depth.get(group, 99), 0 if biased else len(layers))
    return {group for group, layers in depth.items() if layers >= 2}


def scalars_of(model: nn.Module) -> list[nn.Parameter]:
    """The trainable numbers of operations without weights."""
    return [module.scale for module in model.modules() if isinstance(module, Scaled)]


def clip_scalars(scalars: Sequence[Tensor]) -> None:
    """Put them into [0, 1], as GSparsity does, in two calls for all."""
    if scalars:
        with torch.no_grad():
            torch._foreach_clamp_min_(list(scalars), 0.0)
            torch._foreach_clamp_max_(list(scalars), 1.0)


def tie(space: SearchSpace, key: Callable[[str], str]) -> SearchSpace:
    """The search space in which all structures with the same ``key(name)`` go together or not at all.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a1, self.b1, self.a2, self.b2 = (nn.Linear(4, 4) for _ in range(4))
    ...         self.out = nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         x = self.a1(x) + self.b1(x)
    ...         return self.out(self.a2(x) + self.b2(x))
    >>> tied = tie(search_space(Net(), (torch.randn(3, 4),)), key=lambda name: name[0])
    >>> [s.name for s in tied.structures], tied["a"].parameters
    (['a', 'b'], ('a1.weight', 'a1.bias', 'a2.weight', 'a2.bias'))

    Everything that takes a search space takes this one: H2SPG, ProxSGD through ``space_groups``, ``sample``,
    ``construct``.
    """
    members: dict[str, list[Family]] = {}
    for family in space.families:
        members.setdefault(key(family.name), []).append(family)
    tied = []
    for name, same in members.items():
        parameters = dict.fromkeys(p for f in same for p in f.parameters)
        segments = tuple(sorted(i for f in same for i in f.segments))
        tied.append(Family("segment", name, 1, tuple(map(Slices, parameters)), segments=segments))
    return SearchSpace(space.trace, space.graph, tied, space.kept)


def supernet_space(model: nn.Module, images: Tensor) -> SearchSpace:
    """The supernet's search space: its structures are the operations, tied as :func:`cell_key` ties them.

    ``images`` are an example input, [2, C, H, W]. Raises as ``search_space`` does.
    """
    outside = [path for path, _ in model.named_modules() if path and ".edges" not in path]
    leaves = [p for p in outside if not any(q.startswith(f"{p}.") and ".edges" in q for q, _ in model.named_modules())]
    return tie(search_space(model, (images,), keep=leaves), cell_key(model))


def parameters_by_group(model: nn.Module) -> Mapping[str, list[str]]:
    """Names of the parameters of every group of :func:`operation_groups`."""
    grouping = operation_groups(model)
    found: dict[str, list[str]] = {name: [] for name in grouping.names}
    for parameter, owner in grouping.owner.items():
        found[grouping.names[int(owner)]].append(parameter)
    return found


def zero_out(model: nn.Module, groups: Collection[str]) -> None:
    """Put all parameters of these groups at zero."""
    own: dict[str, Any] = dict(model.named_parameters())
    by_group = parameters_by_group(model)
    with torch.no_grad():
        for group in groups:
            for name in by_group.get(group, ()):
                own[name].zero_()
