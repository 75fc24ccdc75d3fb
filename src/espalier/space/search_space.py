"""The search space of a model: every structure that may go, and what makes a removal valid."""

import copy
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from espalier.errors import InvalidSolution, SpaceError
from espalier.graph.constants import Constant, annihilator, constant_output
from espalier.graph.lift import stack_of
from espalier.graph.scaled import scaled
from espalier.graph.segments import Segment, SegmentGraph, aten, segment_graph
from espalier.graph.trace import Trace, trace
from espalier.space.budget import Budget, meet
from espalier.space.cost import Cost, measure
from espalier.space.reduce import reduced
from espalier.space.solution import Solution
from espalier.space.structure import Family, Slices, Structure
from espalier.space.summary import Summary, macs_per_node, summarize
from espalier.space.validity import Validity

Keep = str | type[nn.Module] | Callable[[str, nn.Module], bool]


class SearchSpace:
    """Made by :func:`search_space`.

    ``structures`` lists what may go, ``kept`` maps the name of every other segment to the reason why it stays.
    """

    def __init__(self, traced: Trace, graph: SegmentGraph, structures: Sequence[Structure], kept: Mapping[str, str]):
        self.trace = traced
        self.graph = graph
        self.structures = tuple(structures)
        self.kept = dict(kept)
        self.families = tuple(
            Family(s.level, (s.name,), tuple(Slices(p) for p in s.parameters), s.segments) for s in self.structures
        )
        self._by_name = {s.name: s for s in self.structures}
        self._constants: dict[int, Constant | str] = {}
        products = frozenset(s.index for s in graph if s.joint and s.nodes[0].target is aten.mul.Tensor)
        self.validity = Validity(graph, products, self.constant)

    @property
    def model(self) -> nn.Module:
        return self.trace.model

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, name: str) -> Structure:
        if name not in self._by_name:
            raise SpaceError(
                f"no structure is called '{name}'"
                + (f": {self.kept[name]}." if name in self.kept else ".")
                + f" There are: {', '.join(self._by_name) or 'none'}."
            )
        return self._by_name[name]

    def __repr__(self) -> str:
        return f"SearchSpace({type(self.model).__name__}, {len(self)} structures of {len(self.graph)} segments)"

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the model's parameters (names and shapes) and of the structures."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        for structure in self.structures:
            digest.update(f"{structure.name}={','.join(structure.parameters)};".encode())
        return digest.hexdigest()[:16]

    def constant(self, segment: int) -> Constant:
        """What the removed segment yields."""
        if segment not in self._constants:
            structure = next(s for s in self.structures if segment in s.segments)
            zeroed = self.zeroed([structure.name])
            self._constants[segment] = constant_output(self.trace, self.graph[segment].nodes, zeroed)
        value = self._constants[segment]
        if isinstance(value, str):
            raise SpaceError(f"segment '{self.graph[segment].name}': {value}.")
        return value

    def zeroed(self, removed: Iterable[str]) -> frozenset[str]:
        """Every name of every parameter of these structures (a shared parameter has several)."""
        wanted = {p for name in removed for p in self[name].parameters}
        tensors = {id(p) for name, p in self.model.named_parameters() if name in wanted}
        every = self.model.named_parameters(remove_duplicate=False)
        return frozenset(name for name, p in every if id(p) in tensors)

    def segments_of(self, removed: Iterable[str]) -> dict[int, str]:
        """Index of every segment that goes with these structures, and the structure's name."""
        return {segment: name for name in removed for segment in self[name].segments}

    def explain(self, removed: Iterable[str]) -> str:
        """Why these structures may not go together; '' if they may."""
        return self.validity.explain(self.segments_of(removed))

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
        model = copy.deepcopy(self.model)
        zero = {p for name in solution.removed for p in self[name].parameters}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in zero:
                    parameter.zero_()
                if name in solution.masks:
                    parameter.mul_(solution.masks[name].to(parameter))
        return model

    def removable_in_order(self, names: Iterable[str], stop_at: int | None = None) -> list[str]:
        """Walk ``names`` and take each whose removal, with those taken before, is valid."""
        taken: dict[int, str] = {}
        chosen: list[str] = []
        for name in names:
            if stop_at is not None and len(chosen) >= stop_at:
                break
            trial = taken | dict.fromkeys(self[name].segments, name)
            if not self.validity.explain(trial):
                taken = trial
                chosen.append(name)
        return chosen

    def cost(self, removed: Iterable[str] = ()) -> Cost:
        """Parameters and MACs of the sub-network without these structures, as ``construct`` would build it.

        Counted is what the forward pass in eval mode uses; heads that only training uses are left out.
        """
        network = self.trace.graph_module
        names = list(removed)
        if names:
            gone = self.segments_of(names)
            network = reduced(self.trace, self.graph, gone, self.constant, self.model).module
        return measure(network, self.trace.args, self.trace.kwargs)

    def reachable_cost(self, removed: Iterable[str]) -> Cost:
        """The same without building anything: the sum over all segments that an output still rests on."""
        params, macs = self._segment_costs
        live = self.validity.live(self.segments_of(removed))
        names = {name for index in live for name in self.graph[index].parameters}
        return Cost(sum(params[name] for name in names), sum(macs[index] for index in live))

    @cached_property
    def _segment_costs(self) -> tuple[dict[str, int], list[int]]:
        nodes = macs_per_node(self.trace)
        params = {name: p.numel() for name, p in self.model.named_parameters()}
        return params, [sum(nodes.get(n, 0) for n in segment.nodes) for segment in self.graph]

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

    ``args`` and ``kwargs`` are example inputs. ``levels``: "segment". ``keep`` protects modules: a dotted path
    (with all below it), a module type, or a predicate of (path, module).

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
    unknown = [level for level in levels if level != "segment"]
    if unknown or not levels:
        raise SpaceError(f"unknown level {unknown[0] if unknown else '()'!r}: there is 'segment'.")
    traced = trace(model, args, kwargs)
    graph = segment_graph(traced)
    protected = _protected(model, keep)
    refused: Mapping[str, str] = {}
    if parameterless:
        made = scaled(traced, graph, protected)
        traced, graph, refused = made.trace, made.graph, made.refused
    structures, kept = structures_of(traced, graph, protected)
    kept.update(refused)
    return SearchSpace(traced, graph, structures, kept)


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


def structures_of(traced: Trace, graph: SegmentGraph, protected: set[str]) -> tuple[list[Structure], dict[str, str]]:
    """Discovery of removal structures (Algorithm 2, lines 11 to 16)."""
    users: dict[str, list[int]] = {}
    for segment in graph:
        for name in segment.parameters:
            users.setdefault(name, []).append(segment.index)
    trainable = {name for name, p in traced.model.named_parameters() if p.requires_grad}
    aliases = _aliases(traced.model)
    structures: list[Structure] = []
    kept: dict[str, str] = {}
    tied: set[int] = set()
    for segment in graph:
        if segment.index in tied:
            continue
        reason = _stays(segment, graph, trainable, protected)
        if reason:
            kept[segment.name] = reason
            continue
        own = [p for p in segment.parameters if p in trainable and users[p] == [segment.index]]
        if annihilator(traced, segment.nodes, _with_aliases(own, aliases)) is not None:
            members = [segment]
        else:
            members = [graph[i] for i in _sharing(segment, graph, users)]
            own = list(dict.fromkeys(p for s in members for p in s.parameters if p in trainable))
            reason = _tie_fails(members, segment, graph, traced, own, trainable, protected, aliases)
            if reason:
                kept[segment.name] = reason
                continue
        reason = _constant_fails(traced, members, _with_aliases(own, aliases))
        if reason:
            kept[segment.name] = reason
            continue
        tied.update(s.index for s in members)
        structures.append(Structure(segment.name, "segment", tuple(own), tuple(s.index for s in members)))
    return structures, kept


def _stays(segment: Segment, graph: SegmentGraph, trainable: set[str], protected: set[str]) -> str:
    if segment.joint:
        return "a joint vertex"
    if segment.feeds_output:
        return "the model returns its output"
    if not segment.outgoing:
        return "nothing reads its output"
    rigid = [graph[i].name for i in segment.outgoing if not graph[i].joint]
    if rigid:
        return f"'{rigid[0]}' needs its output and is no joint vertex"
    if not segment.parameters:
        return "it has no parameters"
    if not any(p in trainable for p in segment.parameters):
        return "all its parameters are frozen (requires_grad=False)"
    touched = {path for node in segment.nodes for _, path in stack_of(node)[-1:]}
    touched |= {str(node.target) for node in segment.nodes if node.op == "call_module"}
    touched |= {p.rpartition(".")[0] for p in segment.parameters}
    if touched & protected:
        return f"protected by keep= ('{sorted(touched & protected)[0]}')"
    return ""


def _sharing(segment: Segment, graph: SegmentGraph, users: Mapping[str, list[int]]) -> list[int]:
    """The segments that share trainable parameters with this one, and with those, and so on."""
    pending, found = [segment.index], {segment.index}
    while pending:
        for name in graph[pending.pop()].parameters:
            for other in users[name]:
                if other not in found:
                    found.add(other)
                    pending.append(other)
    return sorted(found)


def _tie_fails(
    members: Sequence[Segment],
    segment: Segment,
    graph: SegmentGraph,
    traced: Trace,
    own: Sequence[str],
    trainable: set[str],
    protected: set[str],
    aliases: Mapping[str, frozenset[str]],
) -> str:
    zeroed = _with_aliases(own, aliases)
    for member in members:
        reason = _stays(member, graph, trainable, protected)
        if reason and member is not segment:
            return f"it shares parameters with '{member.name}', which stays: {reason}"
        if annihilator(traced, member.nodes, zeroed) is None:
            if member is segment:
                return "its output still depends on its input when its trainable parameters are zero"
            return f"it shares parameters with '{member.name}', which zero parameters do not silence"
    return ""


def _constant_fails(traced: Trace, members: Sequence[Segment], zeroed: frozenset[str]) -> str:
    """Evaluate the constant only where what follows the annihilator might be random."""
    for member in members:
        start = annihilator(traced, member.nodes, zeroed)
        assert start is not None
        if len(member.nodes) > start + 1 and any(_may_be_random(traced, n) for n in member.nodes[start + 1 :]):
            value = constant_output(traced, member.nodes, zeroed)
            if isinstance(value, str):
                return value
    return ""


def _may_be_random(traced: Trace, node: Any) -> bool:
    if node.op == "call_module":
        module = traced.graph_module.get_submodule(str(node.target))
        return not type(module).__module__.startswith("torch.nn.modules") or "dropout" in type(module).__name__.lower()
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _aliases(model: nn.Module) -> dict[str, frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(name)
    return {name: frozenset(names[id(p)]) for name, p in model.named_parameters()}


def _with_aliases(names: Iterable[str], aliases: Mapping[str, frozenset[str]]) -> frozenset[str]:
    return frozenset(alias for name in names for alias in aliases[name])
