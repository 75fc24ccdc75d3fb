"""What a removal costs without building it: sums of products of the shares that stay of axes.

A parameter of shape [a, b] whose axes lose a share of their indices keeps (share of a) × (share of b) of its elements,
and an operator so much of its work. Every amount is therefore a polynomial in the number of structures that each
family loses, which is evaluated for many removals at once.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from espalier.graph.axes import Axes, Labels
from espalier.graph.constants import shape_of
from espalier.graph.lift import is_tensor
from espalier.graph.segments import SegmentGraph
from espalier.graph.trace import Trace
from espalier.rules.matmul import ATTENTION, BY_EXPERT, PRODUCTS, letters
from espalier.rules.value import tensors_of
from espalier.space.cost import macs_per_node
from espalier.space.structure import Family

ONE = 0  # the axis that nothing narrows
Row: TypeAlias = tuple[str, float, list[int], list[int]]  # kind, coefficient, axes, segments


class Axis:
    """Registers axes: of each, which share every structure of a family takes away with it."""

    def __init__(self, families: Sequence[Family]):
        self.counts = np.array([f.count for f in families], dtype=np.float64)
        largest = max((int(f.components.max()) for f in families if f.components is not None), default=-1)
        self._family = np.full(largest + 2, -1)
        for k, family in enumerate(families):
            if family.components is not None:
                self._family[family.components] = k
        self._known: dict[tuple[tuple[int, float], ...], int] = {(): ONE}

    def of(self, labels: "np.ndarray | None") -> int:
        """The index of the axis with these components."""
        if labels is None or not len(labels):
            return ONE
        family = self._family[np.minimum(labels, len(self._family) - 1)]
        found, times = np.unique(family[family >= 0], return_counts=True)
        return self.taking({int(k): n / self.counts[k] / len(labels) for k, n in zip(found, times, strict=True)})

    def taking(self, shares: Mapping[int, float]) -> int:
        """The index of an axis that loses ``shares[family]`` with every structure of that family."""
        return self._known.setdefault(tuple(sorted(shares.items())), len(self._known))

    def lost(self) -> np.ndarray:
        """[axes, families]: the share that one structure takes."""
        table = np.zeros((len(self._known), len(self.counts)))
        for shares, row in self._known.items():
            for k, share in shares:
                table[row, k] = share
        return table


class Amounts:
    """Amounts of several kinds, as functions of how many structures each family loses.

    ``kinds`` names them; an amount is the sum over terms of coefficient × the shares of the term's axes. A term counts
    while one of its segments is live, and always if it has none.
    """

    def __init__(self, axis: Axis, rows: Iterable[Row]):
        rows = list(rows)
        self.kinds = tuple(dict.fromkeys(kind for kind, *_ in rows))
        merged: dict[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray] = {}
        for kind, coefficient, axes, segments in rows:
            key = tuple(sorted(a for a in axes if a != ONE)), tuple(sorted(set(segments)))
            merged.setdefault(key, np.zeros(len(self.kinds)))[self.kinds.index(kind)] += coefficient
        self.lost = axis.lost()
        width = max((len(axes) for axes, _ in merged), default=1) or 1
        self.axes = np.zeros((len(merged), width), dtype=np.int64)
        for t, (axes, _) in enumerate(merged):
            self.axes[t, : len(axes)] = axes
        self.coefficients = np.array(list(merged.values())).reshape(len(merged), len(self.kinds))
        pairs = [(t, s) for t, (_, segments) in enumerate(merged) for s in segments]
        self._term, self._segment = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        self._always = np.array([not segments for _, segments in merged], dtype=bool)
        self._segments = 1 + int(self._segment.max(initial=-1))

    def counted(self, live: Collection[int] | None) -> np.ndarray:
        """[terms, kinds]: the coefficients of what is live (everything, for None)."""
        if live is None:
            return self.coefficients
        there = np.zeros(self._segments, dtype=bool)
        there[[s for s in live if s < self._segments]] = True
        counts = self._always.copy()
        counts[self._term[there[self._segment]]] = True
        return self.coefficients * counts[:, None]

    def __call__(self, removed: np.ndarray, live: Collection[int] | None = None) -> np.ndarray:
        """[..., kinds] for [..., families] removed structures."""
        return self.total(removed, self.counted(live))

    def total(self, removed: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """The same with the coefficients at hand."""
        shares = 1.0 - removed @ self.lost.T
        return shares[..., self.axes].prod(-1) @ coefficients

    def slope(self, removed: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """[families]: what the next structure of each family takes from the sum of ``coefficients`` [terms] · terms."""
        factors = (1.0 - self.lost @ removed)[self.axes]
        pull = np.zeros(len(self.lost))
        for d in range(factors.shape[1]):
            others = np.delete(factors, d, axis=1).prod(-1)
            np.add.at(pull, self.axes[:, d], coefficients * others)
        pull[ONE] = 0.0
        return pull @ self.lost


def rows_of(trace: Trace, graph: SegmentGraph, axes: Axes, axis: Axis) -> Iterator[Row]:
    """Parameters and multiply-accumulates: one row for every parameter and for every product of every operator.

    Exact unless constants have to be put back or added, or layers are narrowed behind a concatenation of removed
    segments.
    """
    using: dict[str, list[int]] = {}
    for segment in graph:
        for name in segment.parameters:
            using.setdefault(name, []).append(segment.index)
    whole = Work(trace, axes, axis)
    for name, parameter in trace.model.named_parameters():
        if name in using:
            yield "params", float(parameter.numel()), whole.of_parameter(name), using[name]
    macs = macs_per_node(trace)
    for segment in graph:
        for node in segment.nodes:
            if macs.get(node, 0):
                for share, found, _ in whole(node):
                    yield "macs", macs[node] * share, found, [segment.index]


class Work:
    """The axes that an operator's work is proportional to."""

    def __init__(self, trace: Trace, axes: Axes, axis: Axis):
        self.trace, self.axes, self.axis = trace, axes, axis
        canonical: dict[int, str] = {}
        every = trace.model.named_parameters(remove_duplicate=False)
        self.names = {name: canonical.setdefault(id(p), name) for name, p in every}

    def __call__(self, node: fx.Node) -> list[tuple[float, list[int], str | None]]:
        """(share of the node's work, its axes, the weight that it multiplies by) for each of its products."""
        if node.op == "call_module":
            layer = self.trace.graph_module.get_submodule(str(node.target))
            if isinstance(layer, nn.MultiheadAttention):
                return self._multihead(node, layer)
            weight = self.names.get(f"{node.target}.weight")
            if weight is None:
                return [(1.0, self.of_result(node), None)]
            return [(1.0, [*self.of_parameter(weight), *self._besides(node, layer)], weight)]
        if node.target is ATTENTION:
            return self._attention(node)
        direct = [self.names[str(n.target)] for n in node.all_input_nodes if str(n.target) in self.names]
        weight = direct[0] if direct else None
        if node.target in PRODUCTS or str(node.target) in BY_EXPERT:
            return [(1.0, self._product(node), weight)]
        return [(1.0, self.of_parameter(weight) if weight else self.of_result(node), weight)]

    def of_parameter(self, name: str) -> list[int]:
        """The axes of a parameter."""
        return self._of(self.axes.parameters.get(name, []))

    def of_result(self, node: fx.Node) -> list[int]:
        """The axes of what the node returns."""
        labels = self.axes.labels.get(node, [])
        return [] if isinstance(node.meta["val"], (tuple, list)) else self._of(labels)

    def _besides(self, node: fx.Node, layer: nn.Module) -> list[int]:
        """The axes of the result that a layer's weight does not have: positions and the like."""
        labels = self.axes.labels.get(node)
        if labels is None or isinstance(node.meta["val"], (tuple, list)):
            return []
        own = len(labels) - 1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)
        return self._of([each for d, each in enumerate(labels) if d != own])

    def _of(self, labels: Labels) -> list[int]:
        return [self.axis.of(each) for each in labels]

    def _product(self, node: fx.Node) -> list[int]:
        """Every letter's axis of an einsum-like product, once."""
        sources = [n for n in tensors_of(node) if is_tensor(n)]
        labels: list[Labels] = [self.axes.labels.get(n) or [None] * n.meta["val"].ndim for n in sources]
        named = letters(node, [len(each) for each in labels])
        if named is None:
            return self.of_result(node)
        found: dict[str, int] = {}
        for term, each in zip(named[0], labels, strict=True):
            for letter, axis in zip(term, each, strict=True):
                found[letter] = found.get(letter) or self.axis.of(axis)
        return list(found.values())

    def _attention(self, node: fx.Node) -> list[tuple[float, list[int], str | None]]:
        """Queries times keys, and the result times values."""
        query, _, value = (n for n in tensors_of(node)[:3])
        labels = self.axes.labels.get(query, [])
        first, second = shape_of(query.meta["val"])[-1], shape_of(value.meta["val"])[-1]
        share = first / (first + second)
        return [(share, self._of(labels), None), (1.0 - share, self.of_result(node), None)]

    def _multihead(self, node: fx.Node, layer: nn.MultiheadAttention) -> list[tuple[float, list[int], str | None]]:
        """The three projections of the inputs, the products of activations, and the last projection."""
        queries, keys = (shape_of(n.meta["val"]) for n in tensors_of(node)[:2])
        tokens = [shape[-3 if len(shape) > 2 and not layer.batch_first else -2] for shape in (queries, keys)]
        width, (many, of) = layer.embed_dim, tokens
        projected = width * (many * width + of * ((layer.kdim or width) + (layer.vdim or width)))
        work = np.array([projected, 2 * many * of * width, many * width * width], dtype=np.float64)
        before = self.names.get(f"{node.target}.in_proj_weight") or self.names[f"{node.target}.q_proj_weight"]
        last = self.names[f"{node.target}.out_proj.weight"]
        rows, columns = self.of_parameter(before), self.of_parameter(last)
        return [
            (share, found, weight)
            for share, found, weight in zip(
                (work / work.sum()).tolist(), (rows, columns[1:], columns), (before, None, last), strict=True
            )
        ]
