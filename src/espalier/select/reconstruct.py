"""i-SpaSP, its relatives and our own selectors over the channels and heads of any search space."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.curvature.moments import collect, input_columns, moment_cost
from espalier.curvature.watch import watching
from espalier.errors import BudgetError, SpaceError
from espalier.select.allocate import allocate
from espalier.select.layerwise import (
    PATHS,
    SELECTORS,
    Pair,
    Selector,
    problem_of,
    prune_layers,
    relative_errors,
    write_back,
)
from espalier.select.omp import omp_path
from espalier.select.refit import RIDGE
from espalier.space.budget import Budget, within
from espalier.space.gauge import Gauge
from espalier.space.search_space import SearchSpace
from espalier.space.selection import ROUNDS, USUAL_FLOOR
from espalier.space.solution import Solution
from espalier.space.structure import Family
from espalier.space.widths import Widths


def pairs_of(space: SearchSpace) -> dict[str, Pair]:
    """Family → the layers that write its units and the one that reads them, in the order of the forward pass.

    >>> from espalier import search_space
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> pair = pairs_of(search_space(model, torch.rand(3, 4), levels=("channel",)))["0"]
    >>> pair.producers, pair.consumers
    (('0',), ('2',))

    A family counts if one linear layer or convolution reads it, or several of one shape that read the same tensor:
    hidden widths, filters within a block, heads. Units that are read in several places (a residual stream) have no
    single output to reconstruct: they stay. A batch norm that follows the reader is folded into what counts as error.
    """
    calls: dict[str, list[torch.fx.Node]] = {}
    for node in space.trace.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    order = {name: i for i, name in enumerate(calls)}
    found: dict[str, Pair] = {}
    for family in space.families:
        pair = _pair(space.model, family, calls)
        if pair is not None:
            found[family.name] = pair
    return dict(sorted(found.items(), key=lambda item: order[item[1].consumers[0]]))


def _pair(model: nn.Module, family: Family, calls: Mapping[str, Sequence[torch.fx.Node]]) -> Pair | None:
    consumers = _readers(model, family, calls)
    if not consumers:
        return None
    shapes = {s.parameter: model.get_parameter(s.parameter).ndim for s in family.slices}
    owners = {name.rpartition(".")[0]: ndim for name, ndim in shapes.items() if name.endswith("weight")}
    layers = {p: model.get_submodule(p) for p in owners}
    producers = tuple(p for p, m in layers.items() if isinstance(m, (nn.Linear, nn.Conv2d)) and _groups(m) == 1)
    via = tuple(p for p in layers if p not in producers)
    if not producers or any(p not in calls for p in producers):
        return None
    return Pair(producers, consumers, via, _norm_after(model, consumers, calls), units=family.count)


def _readers(model: nn.Module, family: Family, calls: Mapping[str, Sequence[torch.fx.Node]]) -> tuple[str, ...]:
    """The layers that read the family, where all of them read one tensor and could be refitted together."""
    paths, shapes, sources = [], set(), set()
    for reader in family.readers:
        path, _, leaf = reader.parameter.rpartition(".")
        if not path or leaf != "weight" or reader.dim != 1 or reader.owner is None:
            return ()
        consumer, nodes = model.get_submodule(path), calls.get(path, ())
        if not isinstance(consumer, (nn.Linear, nn.Conv2d)) or _groups(consumer) > 1 or not nodes:
            return ()
        if not torch.equal(
            reader.owner, torch.arange(family.count).repeat_interleave(len(reader.owner) // family.count)
        ):
            return ()
        paths.append(path)
        shapes.add((type(consumer), consumer.weight.shape[1:]))
        sources.add(tuple(node.args[0] for node in nodes))
    if family.components is None or len(shapes) > 1 or len(sources) > 1:
        return ()
    return tuple(sorted(paths, key=list(calls).index))


def _norm_after(model: nn.Module, consumers: Sequence[str], calls: Mapping[str, Sequence[torch.fx.Node]]) -> str | None:
    """The batch norm that alone reads the only consumer's output."""
    nodes = [node for name in consumers for node in calls[name]]
    users = [str(user.target) for node in nodes for user in node.users if user.op == "call_module"]
    if len(nodes) != 1 or len(nodes[0].users) != 1 or not users or len(calls[users[0]]) != 1:
        return None
    norm = model.get_submodule(users[0])
    known = isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) and norm.running_var is not None
    return users[0] if known else None


def _groups(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))


def reconstruct(
    space: SearchSpace,
    data: Iterable[Any],
    budget: Budget | None = None,
    *,
    method: str | Selector = "omp",
    ratios: float | Mapping[str, float] | None = None,
    sequential: bool = True,
    ridge: float = RIDGE,
    multiple: int = 1,
    progress: bool | None = None,
) -> tuple[SearchSpace, Solution]:
    """Prune every family of :func:`pairs_of`, so that its readers' outputs change least; refit these readers.

    >>> from espalier import construct, search_space
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> space = search_space(model, torch.rand(3, 4), levels=("channel",))
    >>> refitted, solution = reconstruct(space, [torch.rand(64, 4)], Budget(macs=0.5))
    >>> construct(refitted, solution)[0].out_features
    8

    ``data`` are unlabelled calibration batches: tensors, or tuples or dicts of the model's arguments (labels behind
    them are ignored as :func:`espalier.curvature.moments.call` says). Returns the search space of a copy of the model
    with the refitted weights, and the solution for it; ``space.model`` is not changed. ``budget`` bounds structures,
    parameters, MACs or latency of the whole network, divided among the families by marginal error; or ``ratios`` says
    which share of its units every family keeps (by family name; families that are not named keep all).

    ``method``: "omp" (orthogonal matching pursuit), "backward", "ispasp", "ispasp-refit", "auxiliary" (also "-pcg",
    "-exact": its steps by conjugate gradients or by the pseudo-inverse; "-together": all layers in each iteration),
    "gfs", or a function of a :class:`Reconstruction` and a size. ``sequential`` corrects each layer for the error that
    earlier ones made. ``progress`` says beforehand what it will cost and shows how far it is; None does so on a
    terminal.

    Under ``torch.distributed`` every process brings its own batches; sums are taken over all, and all get the same
    network.

    Raises :class:`SpaceError` where no family qualifies, :class:`BudgetError` where the families that do cannot meet
    the budget.
    """
    pairs = pairs_of(space)
    if not pairs:
        raise SpaceError(
            "no family of this space is read by one linear layer or convolution (or by several of one shape that read "
            "the same tensor): make it with levels=('channel', 'head'); residual streams have no single reader."
        )
    if (budget is None) == (ratios is None):
        raise BudgetError("reconstruction takes a budget or ratios, one of the two.")
    if isinstance(method, str) and method not in SELECTORS:
        raise SpaceError(f"no method is called '{method}': there are {', '.join(sorted(SELECTORS))}.")
    batches = list(data) if hasattr(data, "__next__") else data
    families = {f.name: f for f in space.families if f.name in pairs}
    chosen = [families[name] for name in pairs]
    with watching(progress, lambda: expected_cost(space.model, list(pairs.values()), batches, sequential)) as watch:
        consumers = [pair.consumers[0] for pair in pairs.values()]
        moments = collect(space.model, consumers, batches, watch=watch)
        if budget is None:
            sizes = _by_ratio(chosen, ratios)
        else:
            path = PATHS.get(method, omp_path) if isinstance(method, str) else omp_path
            problems = [problem_of(space.model, p, moments[p.consumers[0]], ridge) for p in pairs.values()]
            curves = [relative_errors(problem, path) for problem in watch(problems, "errors of all sizes")]
            sizes = _within(space, chosen, curves, budget, multiple)
        results = prune_layers(
            space.model, list(pairs.values()), batches, sizes=sizes, method=method, sequential=sequential, ridge=ridge,
            moments=moments, watch=watch,
        )  # fmt: skip
    refitted = copy.deepcopy(space.model)
    removed: list[str] = []
    for family, result in zip(chosen, results, strict=True):
        write_back(refitted, result)
        gone = torch.ones(family.count, dtype=torch.bool)
        gone[result.selection.support.cpu()] = False
        removed += [family.name_of(i) for i in gone.nonzero().flatten().tolist()]
    again = space.of(refitted)
    stays = [f.name for f in space.families if f.name not in pairs]
    name = method if isinstance(method, str) else getattr(method, "__name__", "selector")
    bounds = {} if budget is None else dict(budget.given)
    return again, again.solution(removed, {"method": name, "budget": bounds, "ratios": ratios, "stays": stays})


def _by_ratio(families: Sequence[Family], ratios: float | Mapping[str, float] | None) -> list[int]:
    known = {f.name for f in families}
    shares = ratios if isinstance(ratios, Mapping) else dict.fromkeys(known, 1.0 if ratios is None else ratios)
    for name, share in shares.items():
        if name not in known or not 0.0 < share <= 1.0:
            raise BudgetError(
                f"ratio {share} for '{name}': a share above 0 and at most 1, for one of {', '.join(sorted(known))}."
            )
    return [max(1, int(shares.get(f.name, 1.0) * f.count + 1e-9)) for f in families]


def _within(
    space: SearchSpace, families: Sequence[Family], curves: Sequence[Tensor], budget: Budget, multiple: int
) -> list[int]:
    """The sizes by marginal error that keep every bound of the budget, checked on the network of these sizes."""
    gauge = Gauge(space, budget)
    position = {f.name: k for k, f in enumerate(space.families)}
    at = [position[f.name] for f in families]
    live, bounds = space.validity.live({}), gauge.bounds
    targets = dict(bounds)

    def predicted(sizes: Sequence[int]) -> dict[str, float]:
        removed = np.zeros(len(space.families))
        removed[at] = [f.count - size for f, size in zip(families, sizes, strict=True)]
        known = dict(zip(gauge.table.kinds, gauge.table(removed, live).tolist(), strict=True))
        return {**known, "structures": len(space) - removed.sum()}

    def used(sizes: Sequence[int]) -> float:
        """The largest share of any bound that is used up."""
        amounts = predicted(sizes)
        return max(amounts[name] / max(bound, 1e-300) for name, bound in targets.items())

    sizes = [f.count for f in families]

    def measured() -> dict[str, float]:
        """What a network of these sizes takes, whichever units they are."""
        return gauge.measured(
            [f.name_of(i) for f, size in zip(families, sizes, strict=True) for i in range(size, f.count)]
        )

    for _ in range(ROUNDS):
        for floor in (USUAL_FLOOR, 0.0):
            widths = Widths(space.families, np.zeros(len(space)), budget, floor)
            allowed = [[int(n) for n in widths.permitted(k) if n % multiple == 0 or n == widths.full[k]] for k in at]
            try:
                sizes = allocate(curves, used, 1.0 + 1e-9, allowed=allowed)
                break
            except ValueError:
                sizes = [each[0] for each in allowed]
        else:
            break
        real = measured()
        if within(real, bounds):
            return sizes
        targets = {name: t * min(1.0, 0.99 * bounds[name] / real[name]) for name, t in targets.items()}
    real = measured()
    raise BudgetError(
        f"{budget} cannot be met by the {len(families)} families that can be refitted: "
        f"the nearest is {gauge.shares(real)}."
    )


def expected_cost(model: nn.Module, pairs: Sequence[Pair], batches: Iterable[Any], sequential: bool = True) -> str:
    """What :func:`reconstruct` will cost, in words; runs the first batch once.

    >>> model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 2))
    >>> print(expected_cost(model, [Pair(("0",), ("2",))], [torch.rand(64, 4)]))
    second moments of 1 layers: 0.7 MiB, 0.2 MFLOP per sample besides the forward pass
    1 passes of the data; selection about 0.2 GFLOP
    """
    first = next(iter(batches), None)
    if first is None:
        return "no calibration data"
    consumers = [pair.consumers[0] for pair in pairs]
    moments = moment_cost(model, consumers, first)
    work = 0.0
    for pair in pairs:
        columns = input_columns(model.get_submodule(pair.consumers[0]))
        outputs = sum(len(model.get_parameter(f"{name}.weight")) for name in pair.consumers)
        work += (1 + sequential) * (2.0 * outputs * columns**2 + 3.0 * columns**3)
    passes = len(pairs) if sequential else 1
    return f"{moments}\n{passes} passes of the data; selection about {work / 1e9:.1f} GFLOP"
