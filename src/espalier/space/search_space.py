"""The search space of a model: every structure that may go, and what makes a removal valid."""

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier.errors import InvalidSolution, SpaceError
from espalier.graph.axes import Axes, coupled_axes
from espalier.graph.constants import Constant, constant_output
from espalier.graph.scaled import scaled
from espalier.graph.segments import SegmentGraph, aten, segment_graph
from espalier.graph.trace import Trace, trace
from espalier.space.amounts import Amounts, Axis, Row, Work, rows_of
from espalier.space.budget import Budget
from espalier.space.chains import meet
from espalier.space.cost import Cost, macs_per_node, measure
from espalier.space.discover import segment_families
from espalier.space.families import axis_families, kept_axes, kernel_families
from espalier.space.masked import with_statistics_over_what_stays, with_zeros
from espalier.space.narrowing import NO_AXES, Narrowing
from espalier.space.reduce import Reduced, reduced
from espalier.space.solution import Solution
from espalier.space.structure import LEVELS, Family, Slices, Structure, Structures
from espalier.space.summary import Summary, summarize
from espalier.space.validity import Validity

Keep = str | type[nn.Module] | Callable[[str, nn.Module], bool]


class SearchSpace:
    """Made by :func:`search_space`.

    ``families`` group what may go by what is sliced alike; ``structures`` lists every single structure. ``kept``
    maps the name of every segment that stays to the reason, ``axes`` knows the coupled axes and their reasons.
    """

    def __init__(
        self,
        traced: Trace,
        graph: SegmentGraph,
        families: Sequence[Family],
        kept: Mapping[str, str],
        axes: Axes = NO_AXES,
    ):
        self.trace = traced
        self.graph = graph
        self.axes = axes
        self.kept = dict(kept)
        self.families = tuple(families)
        self.structures = Structures(self.families)
        self.options: dict[str, Any] = {"levels": tuple(dict.fromkeys(f.level for f in families))}
        self._constants: dict[int, Constant | str] = {}
        products = frozenset(s.index for s in graph if s.joint and s.nodes[0].target is aten.mul.Tensor)
        self.validity = Validity(graph, products, self.constant)
        self._removed: tuple[tuple[str, ...], Mapping[int, torch.Tensor]] = (), {}

    @property
    def model(self) -> nn.Module:
        return self.trace.model

    def of(self, model: nn.Module) -> "SearchSpace":
        """The space of another model of this architecture (a copy with other weights), made with the same options."""
        return search_space(model, self.trace.args, self.trace.kwargs, **self.options)

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, name: str) -> Structure:
        return self.structures[self.position(name)]

    def position(self, name: str) -> int:
        """The position of the structure of this name in ``structures``."""
        try:
            return self.structures.position(name)
        except SpaceError as error:
            known = [f.name if f.level == "segment" else f"{f.name_of(0)} ..." for f in self.families]
            raise SpaceError(
                f"no structure is called '{name}'"
                + (f": {self.kept[name]}." if name in self.kept else ".")
                + f" There are: {', '.join(known) or 'none'}."
            ) from error

    def __repr__(self) -> str:
        return f"SearchSpace({type(self.model).__name__}, {len(self)} structures of {len(self.graph)} segments)"

    def check_not_empty(self) -> None:
        """Raise :class:`SpaceError` with the first reasons where no structure may go."""
        if len(self):
            return
        reasons = list(self.kept.items()) if "segment" in self.options["levels"] else []
        reasons += [(f"{name}, axis {dim}", why) for (name, dim), why in kept_axes(self.axes).items()]
        said = "; ".join(f"'{name}': {reason}" for name, reason in reasons[:5])
        raise SpaceError(f"the search space is empty: no structure of the model may go ({said} ...).")

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the model's parameters (names and shapes) and of the structures."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        for family in self.families:
            several = "" if family.level == "segment" else f"[{family.count}]"
            digest.update(f"{family.name}{several}={','.join(family.parameters)};".encode())
        return digest.hexdigest()[:16]

    def constant(self, segment: int) -> Constant:
        """What the removed segment yields."""
        if segment not in self._constants:
            family = next(f for f in self.families if segment in f.segments)
            zeroed = self.zeroed([family.name])
            self._constants[segment] = constant_output(self.trace, self.graph[segment].nodes, zeroed)
        value = self._constants[segment]
        if isinstance(value, str):
            raise SpaceError(f"segment '{self.graph[segment].name}': {value}.")
        return value

    def zeroed(self, removed: Iterable[str]) -> frozenset[str]:
        """Every name of every parameter of these segments (a shared parameter has several)."""
        wanted = {p for name in removed for p in self[name].parameters}
        tensors = {id(p) for name, p in self.model.named_parameters() if name in wanted}
        every = self.model.named_parameters(remove_duplicate=False)
        return frozenset(name for name, p in every if id(p) in tensors)

    def segments_of(self, removed: Iterable[str]) -> dict[int, str]:
        """Index of every segment that goes with these structures, and the structure's name."""
        gone = [self.families[k] for k in self.removed_of(removed)]
        return {segment: family.name for family in gone for segment in family.segments}

    def removed_of(self, removed: Iterable[str]) -> Mapping[int, torch.Tensor]:
        """Family (its index in ``families``) → positions in it, ascending, of these structures."""
        names = tuple(removed)
        if names != self._removed[0]:  # a solution's names are asked for again and again
            places: dict[int, set[int]] = {}
            for name in names:
                family, index = self.structures.place(self.position(name))
                places.setdefault(family, set()).add(index)
            self._removed = names, {k: torch.tensor(sorted(found)) for k, found in places.items()}
        return self._removed[1]

    def narrowing(self, removed: Iterable[str]) -> Narrowing:
        """What these structures take from every axis."""
        gone: list[int] = []
        for k, positions in self.removed_of(removed).items():
            components = self.families[k].components
            if components is not None:
                gone += components[positions.numpy()].tolist()
        return Narrowing(self.axes, gone)

    def explain(self, removed: Iterable[str]) -> str:
        """Why these structures may not go together; '' if they may."""
        names = list(removed)
        for k, positions in self.removed_of(names).items():
            family = self.families[k]
            if family.components is not None and len(positions) == len(family):
                return f"all {len(family)} structures of '{family.name}' would go ({family.level}): keep at least one."
        return self.validity.explain(self.segments_of(names))

    def is_valid(self, removed: Iterable[str]) -> bool:
        """Whether the network still works without these structures."""
        return not self.explain(removed)

    def solution(self, removed: Iterable[str], provenance: Mapping[str, Any] | None = None) -> Solution:
        """The solution that removes these structures. Raises :class:`InvalidSolution` with the reason."""
        names = tuple(dict.fromkeys(removed))
        reason = self.explain(names)
        if reason:
            raise InvalidSolution(reason)
        return Solution(names, self.fingerprint, provenance=dict(provenance or {}))

    def check(self, solution: Solution) -> None:
        """Raise :class:`InvalidSolution` unless the solution is of this space and valid."""
        if solution.fingerprint != self.fingerprint:
            raise InvalidSolution(
                f"the solution belongs to another model or search space (fingerprint {solution.fingerprint}, "
                f"here {self.fingerprint}): use the space that it was made with."
            )
        reason = self.explain(solution.removed)
        if reason:
            raise InvalidSolution(reason)

    def masked(self, solution: Solution) -> nn.Module:
        """A copy of the full model with the removed structures (and masked weights) at zero.

        This is what the sub-network must equal. It is made without the graph, from the parameters' names alone.
        """
        self.check(solution)
        model = with_zeros(self.model, self._slices(solution.removed), solution.masks)
        return with_statistics_over_what_stays(self.trace, model, self.narrowing(solution.removed))

    def zero_parameters(self, solution: Solution) -> nn.Module:
        """A copy of the model whose removed slices are zero; norms are its own."""
        return with_zeros(self.model, self._slices(solution.removed), solution.masks)

    def _slices(self, removed: Iterable[str]) -> list[tuple[Slices, torch.Tensor]]:
        return [(s, gone) for k, gone in self.removed_of(removed).items() for s in self.families[k].slices]

    def removable_in_order(self, names: Iterable[str], stop_at: int | None = None) -> list[str]:
        """Walk ``names`` and take each whose removal, with those taken before, is valid."""
        taken: dict[int, str] = {}
        left = [len(family) for family in self.families]
        chosen: list[str] = []
        for name in names:
            if stop_at is not None and len(chosen) >= stop_at:
                break
            k, _ = self.structures.place(self.position(name))
            family = self.families[k]
            if family.segments:
                trial = taken | dict.fromkeys(family.segments, name)
                if self.validity.explain(trial):
                    continue
                taken = trial
            elif family.components is not None:
                if left[k] <= 1:
                    continue
                left[k] -= 1
            chosen.append(name)
        return chosen

    def reduced(self, removed: Iterable[str], model: nn.Module) -> Reduced:
        """The trace without these structures over the layers of ``model``, a copy with the removed slices at zero."""
        names = list(removed)
        return reduced(self.trace, self.graph, self.segments_of(names), self.constant, model, self.narrowing(names))

    def cost(self, removed: Iterable[str] = ()) -> Cost:
        """Parameters and MACs of the sub-network without these structures, as ``construct`` would build it.

        Counted is what the forward pass in eval mode uses; heads that only training uses are left out.
        """
        network: nn.Module = self.trace.graph_module
        names = list(removed)
        if names:
            narrow = any(self.families[k].components is not None for k in self.removed_of(names))
            model = with_zeros(self.model, self._slices(names), {}) if narrow else self.model
            network = self.reduced(names, model).module
        return measure(network, self.trace.args, self.trace.kwargs)

    def reachable_cost(self, removed: Iterable[str]) -> Cost:
        """The same without building anything: what an output still rests on, narrowed by what is removed."""
        names = list(removed)
        amounts = dict(zip(self.amounts.kinds, self.amounts(self.lost(names), self.live(names)), strict=True))
        return Cost(round(amounts["params"]), round(amounts["macs"]))

    def lost(self, removed: Iterable[str]) -> np.ndarray:
        """[families]: how many structures of each these are."""
        counts = np.zeros(len(self.families))
        for k, positions in self.removed_of(removed).items():
            counts[k] = len(positions)
        return counts

    def live(self, removed: Iterable[str]) -> set[int]:
        """Indices of the segments that an output rests on without these structures."""
        return self.validity.live(self.segments_of(removed))

    @cached_property
    def amounts(self) -> Amounts:
        """Structures, parameters and MACs per example, as functions of what each family loses."""
        return Amounts(axis := Axis(self.families), self.rows(axis))

    def rows(self, axis: Axis) -> list[Row]:
        """What :attr:`amounts` is made of."""
        rows: list[Row] = [
            ("structures", float(f.count), [axis.taking({k: 1.0 / f.count})], []) for k, f in enumerate(self.families)
        ]
        return rows + list(rows_of(self.trace, self.graph, self.axes, axis))

    def macs_by_weight(self) -> dict[str, int]:
        """Multiply-accumulates of every layer, by the name of its weight."""
        work = Work(self.trace, self.axes, Axis(self.families))
        found: dict[str, int] = {}
        for node, amount in macs_per_node(self.trace).items():
            for share, _, weight in work(node) if amount else ():
                if weight is not None:
                    found[weight] = found.get(weight, 0) + round(amount * share)
        return found

    def sample(self, budget: Budget, generator: torch.Generator | None = None) -> Solution:
        """A random valid solution within the budget: structures go in random order until it is met."""
        order = torch.randperm(len(self), generator=generator).tolist()
        removed = meet(self, [self.structures[i].name for i in order], budget)
        return self.solution(removed, {"method": "random"})

    def summary(self) -> Summary:
        """Every structure with its parameters and MACs, and every other segment with the reason why it stays."""
        return summarize(self)

    def most_removable(self) -> list[str]:
        """A set of structures that may go together, as large as a few orders find, downstream ones first."""
        names = [s.name for s in self.structures]
        orders = [names[::-1], names]
        rng = random.Random(0)
        orders += [rng.sample(names, len(names)) for _ in range(3)]
        return max((self.removable_in_order(order) for order in orders), key=len, default=[])


def search_space(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor,
    kwargs: Mapping[str, Any] | None = None,
    levels: Sequence[str] = ("segment",),
    keep: Sequence[Keep] = (),
    parameterless: bool = False,
) -> SearchSpace:
    """Find every structure that may be removed from ``model`` (Algorithm 2 of ASGSSD).

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.a(x) + self.b(x))
    >>> space = search_space(Net(), (torch.randn(3, 4),))
    >>> [s.name for s in space.structures]
    ['a', 'b']
    >>> space.is_valid(["a"]), space.is_valid(["a", "b"])
    (True, False)

    ``args`` and ``kwargs`` are example inputs. ``levels``: one or several of "segment", "channel" (filters, neurons,
    embedding widths), "head" (of attention) and "kernel" (one k × k slice of a convolution, masked rather than
    removed), in one space. ``keep`` protects modules: a dotted path (with all below it), a module type, or a predicate
    of (path, module).

    ``parameterless=True`` makes skips, pools and identities removable too, which the paper cannot: each gets one
    trainable scalar, at first 1, that multiplies its output. ``space.model`` is then a module of its own, an
    ``fx.GraphModule`` that computes what ``model`` does and shares its parameters, with the scalars beside them
    (``scalars.<name>``): train that one. ``construct`` removes a zero scalar's structure, lets a scalar of 1
    vanish and folds any other into a linear layer before or after it; where there is none it stays, as one
    parameter of the sub-network. The cost counts every scalar that is kept, so that it is an upper bound.
    A scalar is far larger than a weight: ``saliency="balanced"`` ranks both kinds apart, or skips hardly ever go.

    >>> space = search_space(Net(), (torch.randn(3, 4),), parameterless=True)
    >>> [s.name for s in space.structures]
    ['a', 'b']

    Raises :class:`TraceError` if the model cannot be traced, :class:`SpaceError` for an unknown level or a
    ``keep`` that matches nothing.
    """
    levels = (levels,) if isinstance(levels, str) else tuple(levels)
    keep = (keep,) if isinstance(keep, str | type) else tuple(keep)
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels:
        known = ", ".join(f"'{level}'" for level in LEVELS)
        raise SpaceError(f"unknown level {unknown[0] if unknown else '()'!r}: there are {known}.")
    traced = trace(model, args, kwargs)
    graph = segment_graph(traced)
    paths = _protected(model, keep)
    refused: Mapping[str, str] = {}
    if parameterless:
        made = scaled(traced, graph, paths)
        traced, graph, refused = made.trace, made.graph, made.refused
    families, kept = segment_families(traced, graph, paths)
    kept.update(refused)
    if "segment" not in levels:
        families = []
    axes, names = NO_AXES, {f.name for f in families}
    held = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in paths}
    if {"channel", "head"} & set(levels):
        axes = coupled_axes(traced, held)
        families += axis_families(axes, traced.model, levels, names)
    if "kernel" in levels:
        families += kernel_families(traced.model, held, {f.name for f in families})
    space = SearchSpace(traced, graph, families, kept, axes)
    space.options = {"levels": levels, "keep": keep, "parameterless": parameterless}
    return space


def _protected(model: nn.Module, keep: Sequence[Keep]) -> set[str]:
    """Dotted paths of all protected modules."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths: set[str] = set()
    for wish in keep:
        if isinstance(wish, str):
            found = {p for p in modules if p == wish or p.startswith(f"{wish}.")}
        elif isinstance(wish, type):
            found = {p for p, m in modules.items() if isinstance(m, wish)}
        else:
            found = {p for p, m in modules.items() if wish(p, m)}
        if not found:
            raise SpaceError(f"keep={wish!r} matches no module of {type(model).__name__}.")
        paths |= found
    return paths
