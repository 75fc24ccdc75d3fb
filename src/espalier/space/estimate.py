"""What a removal costs without building it: every parameter and every operator, scaled by what stays of its axes."""

import numpy as np
from torch import fx

from espalier.graph.axes import Axes, Labels
from espalier.graph.segments import SegmentGraph
from espalier.graph.trace import Trace
from espalier.rules import Kept
from espalier.space.cost import Cost
from espalier.space.narrowing import Narrowing
from espalier.space.summary import macs_per_node


class CostModel:
    """Called with the live segments and the narrowing, it returns a :class:`Cost`.

    The multiply-accumulates of a layer shrink with its weight, those of a product of activations with its result.
    Exact unless constants have to be put back or layers are narrowed behind a concatenation of removed segments.
    """

    def __init__(self, trace: Trace, graph: SegmentGraph, axes: Axes):
        self.graph, self.axes = graph, axes
        self.sizes = {name: tuple(p.shape) for name, p in trace.model.named_parameters()}
        canonical: dict[int, str] = {}
        names = {n: canonical.setdefault(id(p), n) for n, p in trace.model.named_parameters(remove_duplicate=False)}
        macs = macs_per_node(trace)
        self.work: list[list[tuple[int, str | fx.Node]]] = []
        for segment in graph:
            rows: list[tuple[int, str | fx.Node]] = []
            for node in segment.nodes:
                if macs.get(node, 0):
                    weight = _of_layer(node, names) if node.op == "call_module" else _weight(node, names)
                    rows.append((macs[node], weight or node))
            self.work.append(rows)
        self.parameters = [segment.parameters for segment in graph]

    def __call__(self, live: set[int], narrowing: Narrowing) -> Cost:
        share = _Shares(self.axes, narrowing)
        names = {name for index in live for name in self.parameters[index]}
        params = sum(round(float(np.prod(self.sizes[n])) * share.of_parameter(n)) for n in names)
        macs = sum(amount * share.of(row) for index in live for amount, row in self.work[index])
        return Cost(params, round(macs))


class _Shares:
    """What fraction of a tensor stays."""

    def __init__(self, axes: Axes, narrowing: Narrowing):
        self.axes, self.narrowing = axes, narrowing
        self._known: dict[object, float] = {}

    def of_parameter(self, name: str) -> float:
        if not self.narrowing:
            return 1.0
        if name not in self._known:
            labels = self.axes.parameters.get(name, [])
            self._known[name] = self._share(labels, self.narrowing.of_parameter(name))
        return self._known[name]

    def of(self, row: "str | fx.Node") -> float:
        if isinstance(row, str):
            return self.of_parameter(row)
        if not self.narrowing or row not in self.axes.labels:
            return 1.0
        return self._share(self.axes.labels[row], self.narrowing.of(row))

    def _share(self, labels: Labels, kept: Kept) -> float:
        share = 1.0
        for dim, index in kept.items():
            axis = labels[dim]
            share *= len(index) / len(axis) if axis is not None else 1.0
        return share


def _weight(node: fx.Node, names: dict[str, str]) -> str | None:
    """The parameter that a functional layer multiplies by."""
    direct = [names[str(n.target)] for n in node.all_input_nodes if n.op == "get_attr" and str(n.target) in names]
    return direct[0] if direct else None


def _of_layer(node: fx.Node, names: dict[str, str]) -> str | None:
    """The weight that stands for the layer's work (attention: that of its last projection)."""
    return names.get(f"{node.target}.weight") or names.get(f"{node.target}.out_proj.weight")
