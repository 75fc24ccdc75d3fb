"""Figures of networks as vertices and edges: the trace graph, whole or folded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx, nn

from espalier.graph.segments import DataFlow, segment_graph
from espalier.graph.trace import Trace, trace
from espalier.report.operators import (
    GLYPHS,
    JOINTS,
    kind_of,
    layer_text,
    operator_name,
    quantity,
    shape_text,
    user_line,
)
from espalier.space.cost import macs_per_node


@dataclass(frozen=True)
class Vertex:
    """One box, circle (a joint vertex) or pill (an input or output) of a drawing.

    ``kind`` is a key of :data:`espalier.report.operators.KINDS`, or ``io`` or ``segment``. ``strip`` holds
    the kinds of the nodes within a segment. ``rows`` are
    (text, status) of what one box stands for. ``status``: "", ``candidate`` (a structure), ``removed`` (a
    redundant structure), ``idle`` (nothing rests on it any more).
    """

    title: str
    note: str = ""
    detail: str = ""
    kind: str = "other"
    form: str = "box"
    strip: tuple[str, ...] = ()
    tooltip: str = ""
    status: str = ""
    rows: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Figure:
    """A graph to draw; ``edges`` are pairs of positions in ``vertices``."""

    title: str
    vertices: tuple[Vertex, ...]
    edges: tuple[tuple[int, int], ...]


def trace_figure(traced: Trace, title: str = "Trace graph") -> Figure:
    """Every operator on the data's way from the inputs to the outputs."""
    subject = Subject(traced)
    runs = [(node,) for node in subject.flow.vertices]
    return subject.figure(title, runs, [subject.node(node) for node in subject.flow.vertices])


def network_figure(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    title: str = "Sub-network",
) -> Figure:
    """The trace graph of any module, traced afresh on example inputs."""
    return trace_figure(trace(network, args, kwargs), title)


def folded_figure(traced: Trace, title: str = "Network") -> Figure:
    """A shorter trace graph: one box for each layer with weights and what surrounds it."""
    subject = Subject(traced)
    runs: list[tuple[fx.Node, ...]] = []
    for segment in segment_graph(traced):
        run: list[fx.Node] = []
        weighty = False
        for node in segment.nodes:
            heavy = kind_of(node, subject.root) in ("weight", "attention")
            pooled = weighty and kind_of(node, subject.root) == "pool"
            if run and ((weighty and heavy) or pooled):
                runs.append(tuple(run))
                run, weighty = [], False
            run.append(node)
            weighty = weighty or heavy
        runs.append(tuple(run))
    names = [subject.run_name(run) for run in runs]
    return subject.figure(title, runs, [subject.run(name, run) for name, run in zip(names, runs, strict=True)])


class Subject:
    """A traced network, with all that vertices tell of its nodes."""

    def __init__(self, traced: Trace):
        self.trace, self.root = traced, traced.graph_module
        self.flow = DataFlow(traced)
        self.sizes = {name: p.numel() for name, p in traced.model.named_parameters()}

    @cached_property
    def macs(self) -> dict[fx.Node, int]:
        return macs_per_node(self.trace)

    def figure(self, title: str, runs: Sequence[Sequence[fx.Node]], vertices: Sequence[Vertex]) -> Figure:
        """One vertex per run of nodes, and the inputs and outputs around them."""
        inputs = [n for n in self.flow.sources if n.op == "placeholder" and self.flow.readers[n]]
        all_runs = [*((n,) for n in inputs), *runs]
        place = {node: i for i, run in enumerate(all_runs) for node in run}
        found = [*map(_input, inputs), *vertices]
        edges = [
            (place[source], place[node])
            for node in self.flow.vertices
            for source in self.flow.sources[node]
            if source in place and node in place and place[source] != place[node]
        ]
        returned = [n for n in self.flow.sources if n in self.flow.returned and n in place]
        edges += [(place[n], len(found) + i) for i, n in enumerate(returned)]
        found += [_output(n, i if len(returned) > 1 else None) for i, n in enumerate(returned)]
        return Figure(title, tuple(found), tuple(dict.fromkeys(edges)))

    def node(self, node: fx.Node) -> Vertex:
        """A vertex for one node."""
        if self.flow.is_joint(node):
            return self._joint(node, "", "")
        name = operator_name(node)
        layer = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        return Vertex(
            title=name,
            note=layer_text(layer) if layer is not None else "",
            detail=shape_text(node),
            kind=kind_of(node, self.root),
            tooltip=self._tooltip(name, (node,), layer),
        )

    def run(self, name: str, nodes: Sequence[fx.Node], status: str = "", words: str = "") -> Vertex:
        """A vertex for a run of nodes, with one tile per node."""
        if self.flow.is_joint(nodes[0]):
            return self._joint(nodes[0], status, words)
        params, macs = self._cost(nodes)
        costs = [f"{quantity(params)} params"] if params else []
        costs += [f"{quantity(macs)} MACs"] if macs else []
        head = name if len(nodes) == 1 else f"{name} ({len(nodes)} nodes)"
        return Vertex(
            title=name,
            detail=" · ".join(costs) or shape_text(nodes[-1]),
            kind="segment",
            strip=tuple(kind_of(n, self.root) for n in nodes),
            tooltip=self._tooltip(f"{head}\n{words}" if words else head, nodes),
            status=status,
        )

    def run_name(self, nodes: Sequence[fx.Node]) -> str:
        """The layers of a run; its operators where it has no layers."""
        layers = [str(n.target) for n in nodes if n.op == "call_module"]
        return "-".join(layers or [operator_name(n) for n in nodes])

    def _joint(self, node: fx.Node, status: str, words: str) -> Vertex:
        name = operator_name(node)
        tooltip = self._tooltip(f"{name}\n{words}" if words else name, (node,))
        title, note = GLYPHS.get(name, name), JOINTS.get(name, name)
        return Vertex(title, note, shape_text(node), "joint", "circle", (), tooltip, status)

    def _cost(self, nodes: Sequence[fx.Node]) -> tuple[int, int]:
        names = {name for n in nodes for name in self.flow.parameters.get(n, ())}
        return sum(self.sizes.get(name, 0) for name in names), sum(self.macs.get(n, 0) for n in nodes)

    def _tooltip(self, head: str, nodes: Sequence[fx.Node], layer: nn.Module | None = None) -> str:
        params, macs = self._cost(nodes)
        shape = shape_text(nodes[-1])
        rows = [
            head,
            str(layer) if layer is not None and not list(layer.children()) else "",
            f"output {shape}" if shape else "",
            f"{params:,} parameters" if params else "",
            f"{macs:,} MACs per example" if macs else "",
            user_line(nodes[0]),
        ]
        return "\n".join(row for row in rows if row)


def _input(node: fx.Node) -> Vertex:
    name, shape = str(node.target), shape_text(node)
    return Vertex(name, "", shape, "io", "pill", tooltip=f"input {name}\n{shape} per example")


def _output(node: fx.Node, index: int | None) -> Vertex:
    name, shape = "output" if index is None else f"output {index}", shape_text(node)
    return Vertex(name, "", shape, "io", "pill", tooltip=f"{name}\n{shape} per example")
