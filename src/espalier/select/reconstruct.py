"""i-SpaSP, its relatives and our own selectors over the channels and heads of any search space."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from espalier.curvature.moments import collect
from espalier.errors import BudgetError, SpaceError
from espalier.select.allocate import allocate
from espalier.select.layerwise import PATHS, Pair, problem_of, prune_layers, write_back
from espalier.select.omp import omp_path
from espalier.select.refit import RIDGE
from espalier.space.budget import Budget
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.space.structure import Family


def pairs_of(space: SearchSpace) -> dict[str, Pair]:
    """Family → the layers that write its units and the one that reads them, in the order of the forward pass.

    >>> from espalier import search_space
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> pair = pairs_of(search_space(model, torch.rand(3, 4), levels=("channel",)))["0"]
    >>> pair.producers, pair.consumers
    (('0',), ('2',))

    A family counts if one linear layer or convolution reads it: hidden widths, filters within a block, heads. Units
    that several layers read (a residual stream) have no single output to reconstruct: they stay.
    """
    order = {str(n.target): i for i, n in enumerate(space.trace.graph.nodes) if n.op == "call_module"}
    found: dict[str, Pair] = {}
    for family in space.families:
        pair = _pair(space.model, family)
        if pair is not None and all(p in order for p in (*pair.producers, *pair.consumers)):
            found[family.name] = pair
    return dict(sorted(found.items(), key=lambda item: order[item[1].consumers[0]]))


def _pair(model: nn.Module, family: Family) -> Pair | None:
    if family.components is None or len(family.readers) != 1:
        return None
    (reader,) = family.readers
    path, _, leaf = reader.parameter.rpartition(".")
    if not path or leaf != "weight" or reader.dim != 1 or reader.owner is None:
        return None
    consumer = model.get_submodule(path)
    if not isinstance(consumer, (nn.Linear, nn.Conv2d)) or getattr(consumer, "groups", 1) > 1:
        return None
    block = len(reader.owner) // family.count
    if not torch.equal(reader.owner, torch.arange(family.count).repeat_interleave(block)):
        return None
    shapes = {s.parameter: model.get_parameter(s.parameter).ndim for s in family.slices}
    owners = {name.rpartition(".")[0]: ndim for name, ndim in shapes.items() if name.endswith("weight")}
    layers = {p: model.get_submodule(p) for p in owners}
    producers = tuple(p for p, m in layers.items() if isinstance(m, (nn.Linear, nn.Conv2d)) and _groups(m) == 1)
    via = tuple(p for p in layers if p not in producers)
    return Pair(producers, (path,), via, units=family.count) if producers else None


def _groups(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))


def reconstruct(
    space: SearchSpace,
    data: Iterable[Any],
    budget: Budget,
    *,
    method: str = "omp",
    sequential: bool = True,
    ridge: float = RIDGE,
    multiple: int = 1,
) -> tuple[SearchSpace, Solution]:
    """Prune every family that one layer reads, so that this layer's output changes least; refit that layer.

    >>> from espalier import construct, search_space
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> space = search_space(model, torch.rand(3, 4), levels=("channel",))
    >>> refitted, solution = reconstruct(space, [torch.rand(64, 4)], Budget(macs=0.5))
    >>> construct(refitted, solution)[0].out_features
    8

    ``data`` are unlabelled calibration batches: tensors, or tuples or dicts of the model's arguments (labels behind
    them are ignored as :func:`espalier.curvature.moments.call` says). Returns the search space of a copy of the model
    with the refitted weights, and the solution for it; ``space.model`` is not changed. ``budget`` bounds parameters
    or MACs, as fractions. ``method``: "omp" (orthogonal matching pursuit), "backward", "ispasp", "ispasp-refit",
    "auxiliary" or "gfs". ``sequential`` corrects each layer for the error that earlier ones made.

    Raises :class:`SpaceError` where no family qualifies, :class:`BudgetError` where the families that do cannot meet
    the budget.
    """
    pairs = pairs_of(space)
    if not pairs:
        raise SpaceError(
            "no family of this space is read by exactly one linear layer or convolution: "
            "make it with levels=('channel', 'head')."
        )
    if not set(budget.given) <= {"params", "macs"}:
        raise BudgetError(f"reconstruction takes a budget of params or macs, not {budget}.")
    batches = list(data) if hasattr(data, "__next__") else data
    families = {f.name: f for f in space.families if f.name in pairs}
    chosen = [families[name] for name in pairs]
    consumers = [pair.consumers[0] for pair in pairs.values()]
    moments = collect(space.model, consumers, batches)
    problems = [problem_of(space.model, p, moments[p.consumers[0]], ridge) for p in pairs.values()]
    path = PATHS.get(method, omp_path)
    curves = [path(problem).errors / max(problem.energy, 1e-300) for problem in problems]
    cost = FamilyCost(space, chosen)
    full = cost([f.count for f in chosen])

    limits = budget.bounds({"params": full[0], "macs": full[1]})

    def used(sizes: Sequence[int]) -> float:
        """The largest share of any bound that is used up."""
        params, macs = cost(sizes)
        return max(amount / limits[name] for name, amount in (("params", params), ("macs", macs)) if name in limits)

    try:
        sizes = allocate(curves, used, 1.0, multiple=multiple)
    except ValueError as error:
        least = cost([1] * len(chosen))
        raise BudgetError(
            f"{budget} cannot be met by the {len(chosen)} families that one layer reads: the nearest is "
            f"params={least[0] / full[0]:.3f} or macs={least[1] / max(full[1], 1):.3f}."
        ) from error
    results = prune_layers(
        space.model, list(pairs.values()), batches, sizes=sizes, method=method, sequential=sequential, ridge=ridge,
        moments=moments,
    )  # fmt: skip
    refitted = copy.deepcopy(space.model)
    removed: list[str] = []
    for family, result in zip(chosen, results, strict=True):
        write_back(refitted, result)
        gone = torch.ones(family.count, dtype=torch.bool)
        gone[result.selection.support] = False
        removed += [family.name_of(i) for i in gone.nonzero().flatten().tolist()]
    again = space.of(refitted)
    return again, again.solution(removed, {"method": method, "budget": vars(budget)})


class FamilyCost:
    """Parameters and MACs as a function of how many structures each family keeps."""

    def __init__(self, space: SearchSpace, families: Sequence[Family]):
        self.counts = [f.count for f in families]
        macs = space.macs_by_weight()
        self.rest = space.reachable_cost(()).macs - sum(macs.values())
        self.items: list[tuple[int, int, list[list[tuple[int, float]]]]] = []
        touching: dict[str, dict[int, list[tuple[int, float]]]] = {}
        for k, family in enumerate(families):
            for piece in (*family.slices, *family.readers):
                if piece.owner is not None and piece.dim is not None:
                    share = float((piece.owner >= 0).float().mean())
                    touching.setdefault(piece.parameter, {}).setdefault(piece.dim, []).append((k, share))
        for name, parameter in space.model.named_parameters():
            axes = list(touching.get(name, {}).values())
            self.items.append((parameter.numel(), macs.get(name, 0), axes))

    def __call__(self, sizes: Sequence[int]) -> tuple[float, float]:
        lost = [1.0 - size / count for size, count in zip(sizes, self.counts, strict=True)]
        params, macs = 0.0, float(self.rest)
        for numel, work, axes in self.items:
            share = 1.0
            for axis in axes:
                share *= 1.0 - sum(part * lost[k] for k, part in axis)
            params += numel * share
            macs += work * share
        return params, macs
