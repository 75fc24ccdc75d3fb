"""Coupled axes: which indices of which axes must go together, through the whole trace.

Every axis of every tensor either stays whole (``None``) or carries one atom per index
(:mod:`espalier.graph.atoms`). One pass over the trace applies a rule per operator (:mod:`espalier.rules`); an
operator without a rule keeps the axes of all that it reads, and the reason is remembered.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import fx, nn

from espalier.graph.atoms import Atoms, Ids, Link, Solved
from espalier.graph.constants import hint, shape_of
from espalier.graph.lift import is_tensor
from espalier.graph.movement import movements
from espalier.graph.source import where
from espalier.graph.trace import Trace
from espalier.modes import evaluating

Labels: TypeAlias = list[Ids | None]
Couples: TypeAlias = Callable[["Coupling", fx.Node, list[Labels]], "Labels | list[Labels] | None"]

COUPLES: dict[object, Couples] = {}


def couples(*targets: object) -> Callable[[Couples], Couples]:
    """Register how ATen operators or module types couple the axes of what they read and return.

    The function takes (coupling, node, labels of the tensors that the node reads) and returns the labels of its
    result (a list of them if it returns several tensors); None means that it does not know the case.
    """

    def register(function: Couples) -> Couples:
        for target in targets:
            COUPLES[target] = function
        return function

    return register


@dataclass(frozen=True, eq=False)
class Axes:
    """``labels[node]`` and ``parameters[name]`` give one component per index of every axis, None where it stays whole.

    ``reason[component]`` is '' for what may go, else why it stays. ``zeroed`` and ``read`` are the (parameter,
    axis) pairs that a removed component zeroes, and those that are narrowed along with it. ``statistics`` maps the
    nodes that average over axes to these axes; ``heads`` are the components that are attention heads.
    """

    labels: dict[fx.Node, Labels]
    parameters: dict[str, Labels]
    zeroed: frozenset[tuple[str, int]]
    statistics: dict[fx.Node, tuple[int, ...]]
    heads: frozenset[int]
    reasons: dict[int, str]
    unknown: dict[fx.Node, str]


class Coupling:
    """What a rule may ask for and say."""

    def __init__(self, trace: Trace, protected: Collection[str]):
        self.trace, self.atoms = trace, Atoms()
        self.labels: dict[fx.Node, Any] = {}
        self.parameters: dict[str, Labels] = {}
        self.statistics: dict[fx.Node, tuple[int, ...]] = {}
        self.unknown: dict[fx.Node, str] = {}
        self._heads: list[Ids] = []
        self._written: list[Ids] = []
        self._contracted: list[Ids] = []
        self._protected = protected
        self._modules = dict(trace.graph_module.named_modules(remove_duplicate=False))
        canonical: dict[int, str] = {}
        self.names = {
            name: canonical.setdefault(id(p), name) for name, p in trace.model.named_parameters(remove_duplicate=False)
        }
        self._tensors = {canonical[id(p)]: p for p in trace.model.parameters()}

    # What rules use.

    def module(self, node: fx.Node) -> Any:
        return self._modules[str(node.target)]

    def shape(self, node: fx.Node) -> list[int]:
        return shape_of(node.meta["val"])

    def fresh(self, size: int) -> Ids | None:
        """Atoms for a new axis; None for an axis of one index, which always stays."""
        return self.atoms.fresh(size) if size > 1 else None

    def parameter(self, name: str) -> Labels:
        """The axes of a parameter, by any of its names."""
        name = self.names[name]
        if name not in self.parameters:
            tensor = self._tensors[name]
            self.parameters[name] = [self.fresh(n) for n in tensor.shape]
            if name in self._protected:
                self.fix(self.parameters[name], "keep= protects it")
        return self.parameters[name]

    def own(self, node: fx.Node, name: str) -> Labels | None:
        """The axes of a parameter of the layer that the node calls; None if it has none of that name."""
        path = f"{node.target}.{name}"
        return self.parameter(path) if path in self.names else None

    def fix(self, labels: Iterable[Ids | None], reason: str) -> None:
        for axis in labels:
            if axis is not None:
                self.atoms.fix(axis, reason)

    def join(self, a: Ids | None, b: Ids | None, node: fx.Node) -> Ids | None:
        """The two axes are one; if either stays, so does the other."""
        if a is None or b is None or len(a) != len(b):
            self.fix((a, b), f"it meets an axis that stays whole at {self.at(node)}")
            return None
        self.atoms.join(a, b)
        return a

    def written(self, *axes: Ids | None) -> None:
        """Axes of parameters along which they make their operator's result: removal zeroes them."""
        self._written += [a for a in axes if a is not None]

    def contracted(self, *axes: Ids | None) -> None:
        """Axes over which an operator sums: a parameter's are narrowed, and need not be zero."""
        self._contracted += [a for a in axes if a is not None]

    def heads(self, axis: Ids | None) -> None:
        """The axis counts attention heads."""
        if axis is not None:
            self._heads.append(axis)
            self.atoms.prefer(axis)

    def split(self, axis: Ids | None, sizes: Sequence[int], why: str) -> list[Ids | None]:
        """See the axis as a grid of these sizes, of which one can be narrowed."""
        if axis is None:
            return [None] * len(sizes)
        outer = [self.fresh(n) for n in sizes]
        at = np.unravel_index(np.arange(len(axis)), tuple(sizes))
        known = [(o, a) for o, a in enumerate(outer) if a is not None]
        pairs = {(0, k): (axis, a[at[o]]) for k, (o, a) in enumerate(known)}
        self.atoms.link(Link([axis], [a for _, a in known], pairs, why))
        return outer

    def statistic(self, node: fx.Node, *dims: int) -> None:
        """The node averages over these axes: over what stays of them."""
        self.statistics[node] = tuple(sorted({*self.statistics.get(node, ()), *dims}))

    def at(self, node: fx.Node) -> str:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return f"{name} in {where(node)}"

    def moved(self, node: fx.Node, labels: Labels, function: Callable[[torch.Tensor], object]) -> list[Labels]:
        """Labels of the results of a data-movement operator, found by running it on index labels."""
        source = next(n for n in node.all_input_nodes if is_tensor(n))
        shape = tuple(self.shape(source))
        results: list[Labels] = []
        for move in movements(shape, function):
            result: Labels = [None] * move.source.ndim
            lines: dict[int, dict[int, Ids]] = {}
            for dim, axis in enumerate(labels):
                if axis is None:
                    continue
                depends = move.depends(move.digit(dim))
                if depends is None:
                    self.fix([axis], f"{self.at(node)} mixes it with other axes")
                elif depends:
                    lines[dim] = depends
            self._carry(node, move, labels, lines, result)
            results.append(result)
        return results

    def _carry(
        self, node: fx.Node, move: Any, labels: Labels, lines: dict[int, dict[int, Ids]], result: Labels
    ) -> None:
        targets = sorted({q for depends in lines.values() for q in depends})
        meets = {q: [d for d in lines if q in lines[d]] for q in targets}
        for dim, depends in lines.items():
            (first, *more) = depends
            if not more and meets[first] == [dim]:
                origin = move.digit(dim)[(0,) * move.source.ndim]
                result[first] = labels[dim][origin + depends[first]]  # type: ignore[index]
        # Axes that are cut or merged: only one of them can be narrowed.
        linked = [d for d, depends in lines.items() if len(depends) > 1 or len(meets[next(iter(depends))]) > 1]
        while linked:
            inner, outer = {linked[0]}, set(lines[linked[0]])
            while True:
                more_inner = {d for q in outer for d in meets[q]} - inner
                if not more_inner:
                    break
                inner |= more_inner
                outer |= {q for d in more_inner for q in lines[d]}
            linked = [d for d in linked if d not in inner]
            self._link(node, move, labels, lines, result, sorted(inner), sorted(outer))

    def _link(
        self,
        node: fx.Node,
        move: Any,
        labels: Labels,
        lines: dict[int, dict[int, Ids]],
        result: Labels,
        inner: list[int],
        outer: list[int],
    ) -> None:
        for q in outer:
            result[q] = self.fresh(move.source.shape[q])
        pairs: dict[tuple[int, int], tuple[Ids, Ids]] = {}
        for i, d in enumerate(inner):
            axis = labels[d]
            assert axis is not None
            along = sorted(lines[d])
            at: list[int | slice] = [slice(None) if q in along else 0 for q in range(move.source.ndim)]
            digit = move.digit(d)[tuple(at)]
            for k, q in enumerate(along):
                target = result[q]
                assert target is not None
                shape = [1] * digit.ndim
                shape[k] = -1
                index = np.broadcast_to(np.arange(digit.shape[k]).reshape(shape), digit.shape)
                pairs[i, outer.index(q)] = (axis[digit].ravel(), target[index].ravel())
        self.atoms.link(
            Link(
                [axis for d in inner if (axis := labels[d]) is not None],
                [axis for q in outer if (axis := result[q]) is not None],
                pairs,
                f"it lies within a group of indices that {self.at(node)} treats as one",
            )
        )

    # The pass over the trace.

    def run(self) -> Axes:
        for node in self.trace.graph.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    for labels in self._each(source):
                        self.fix(labels, "the model returns it")
            elif is_tensor(node):
                self.labels[node] = self._labels_of(node)
        solved = self.atoms.solve()
        return self._result(solved)

    def _each(self, node: fx.Node) -> Iterator[Labels]:
        labels = self.labels.get(node)
        if labels is not None:
            yield from labels if isinstance(node.meta["val"], (tuple, list)) else (labels,)

    def _nothing(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, (tuple, list)):
            return [[None] * getattr(v, "ndim", 0) for v in value]
        return [None] * value.ndim

    def _labels_of(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._nothing(node)
        if node.op == "get_attr":
            target = str(node.target)
            if target in self.names:
                return self.parameter(target)
            return [self.fresh(n) for n in self.shape(node)]
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0] in self.labels:
            return self.labels[node.args[0]][node.args[1]]
        sources = [n for n in _tensors_read(node) if n in self.labels]
        inputs = [self.labels[n] for n in sources]
        if any(isinstance(n.meta["val"], (tuple, list)) for n in sources):
            return self._give_up(node, sources)
        computed = self._computed(node)
        if computed:
            return self._give_up(node, sources, computed)
        rule = self._rule(node)
        if node.op == "call_function" and sources and all(a is None for labels in inputs for a in labels):
            return self._nothing(node)
        found = rule(self, node, inputs) if rule is not None else None
        return self._give_up(node, sources) if found is None else found

    def _rule(self, node: fx.Node) -> Couples | None:
        if node.op == "call_module":
            module = self.module(node)
            if is_known_layer(module):
                return next((COUPLES[c] for c in type(module).__mro__ if c in COUPLES), None)
            return COUPLES[nn.Dropout] if _drops(module, node) else None
        for key in (node.target, str(node.target)):
            if key in COUPLES:
                return COUPLES[key]
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        return COUPLES[torch.Tag.pointwise] if pointwise else None

    def _computed(self, node: fx.Node) -> str:
        """Why the axes of a layer stay whose weight is no parameter but computed from others; else ''."""
        if node.op != "call_module":
            return ""
        for layer in self.module(node).modules():
            own = layer._parameters.keys() | layer._buffers.keys()
            if "weight" not in own and isinstance(getattr(layer, "weight", None), torch.Tensor):
                return (
                    f"the weight of {self.at(node)} is computed from other tensors, as by weight_norm: take that off "
                    "first (torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm)"
                )
        return ""

    def _give_up(self, node: fx.Node, sources: Sequence[fx.Node], reason: str = "") -> Any:
        reason = reason or f"no rule for {self.at(node)}"
        held = [axis for n in sources for labels in self._each(n) for axis in labels if axis is not None]
        if node.op == "call_module":
            held += [
                axis
                for name, _ in self.module(node).named_parameters()
                for axis in self.parameter(f"{node.target}.{name}")
                if axis is not None
            ]
        if held:
            self.unknown[node] = reason
        self.fix(held, reason)
        return self._nothing(node)

    def _result(self, solved: Solved) -> Axes:
        root, reason = solved.root, solved.reason
        marks = {}
        for key, axes in (("written", self._written), ("read", self._contracted), ("heads", self._heads)):
            marks[key] = np.zeros(self.atoms.count, dtype=bool)
            for axis in axes:
                marks[key][axis] = True
        zeroed = {
            (name, dim)
            for name, labels in self.parameters.items()
            for dim, axis in enumerate(labels)
            if axis is not None and (marks["written"][axis].any() or not marks["read"][axis].any())
        }

        def rooted(labels: Labels) -> Labels:
            return [None if axis is None else root[axis] for axis in labels]

        every = {
            node: [rooted(each) for each in labels] if isinstance(node.meta["val"], (tuple, list)) else rooted(labels)
            for node, labels in self.labels.items()
        }
        stays = np.flatnonzero(reason >= 0)
        return Axes(
            every,  # type: ignore[arg-type]
            {name: rooted(labels) for name, labels in self.parameters.items()},
            frozenset(zeroed),
            self.statistics,
            frozenset(root[marks["heads"]].tolist()),
            {int(root[i]): self.atoms.reasons[reason[i]] for i in stays},
            self.unknown,
        )


def coupled_axes(trace: Trace, protected: Collection[str] = ()) -> Axes:
    """Couple all axes of ``trace``; parameters named in ``protected`` stay whole."""
    return Coupling(trace, protected).run()


def _tensors_read(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)
    return [n for n in found if is_tensor(n)]


def is_known_layer(module: nn.Module) -> bool:
    """A layer whose forward is torch's own, or a batch norm with another (that ends in an activation, say)."""
    own = type(module).forward.__module__.startswith("torch.nn.modules")
    return own or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _drops(module: nn.Module, node: fx.Node) -> bool:
    """A layer without parameters that does nothing in eval mode, such as stochastic depth."""
    if any(True for _ in (*module.parameters(), *module.buffers())) or len(_tensors_read(node)) != 1:
        return False
    x = torch.randn(shape_of(node.all_input_nodes[0].meta["val"]))
    try:
        with evaluating(module):
            y = module(x)
    except Exception:
        return False  # whatever it is, it is not a dropout
    return isinstance(y, torch.Tensor) and torch.equal(x, y)


def _number(node: fx.Node) -> Any:
    return hint(node.meta.get("val"))


def numbers(node: fx.Node, *, after: int = 1) -> tuple[list[Any], dict[str, Any]]:
    """The node's arguments behind its first ``after``, symbols replaced by the example's numbers."""
    args, kwargs = fx.map_arg((list(node.args[after:]), dict(node.kwargs)), _number)
    return args, kwargs
