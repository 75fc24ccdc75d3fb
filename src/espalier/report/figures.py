"""The four figures of a search, as vertices and edges: trace graph, segment graph, redundant structures, sub-network."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from espalier.graph.segments import DataFlow, Segment
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
from espalier.space.search_space import SearchSpace
from espalier.space.summary import macs_per_node


@dataclass(frozen=True)
class Vertex:
    """One box, circle (a joint vertex) or pill (an input or output) of a drawing.

    ``kind`` is a key of :data:`espalier.report.operators.KINDS`, or ``io``. ``strip`` holds the kinds of the
    nodes within a segment. ``status``: "", ``candidate`` (a structure), ``removed`` (a redundant structure),
    ``idle`` (nothing rests on it any more).
    """

    title: str
    note: str = ""
    detail: str = ""
    kind: str = "other"
    form: str = "box"
    strip: tuple[str, ...] = ()
    tooltip: str = ""
    status: str = ""


@dataclass(frozen=True)
class Figure:
    """A graph to draw; ``edges`` are pairs of positions in ``vertices``."""

    title: str
    vertices: tuple[Vertex, ...]
    edges: tuple[tuple[int, int], ...]


def trace_figure(traced: Trace, title: str = "Trace graph") -> Figure:
    """Every operator on the data's way from the inputs to the outputs."""
    flow = DataFlow(traced)
    macs = macs_per_node(traced)
    sizes = {name: p.numel() for name, p in traced.model.named_parameters()}
    root = traced.graph_module
    inputs = [n for n in flow.sources if n.op == "placeholder" and flow.readers[n]]
    vertices = [_input(n) for n in inputs]
    for node in flow.vertices:
        joint = flow.is_joint(node)
        layer = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        params = sum(sizes.get(p, 0) for p in flow.parameters[node])
        name = operator_name(node)
        vertices.append(
            Vertex(
                title=GLYPHS.get(name, name) if joint else name,
                note=JOINTS.get(name, name) if joint else layer_text(layer) if layer is not None else "",
                detail=shape_text(node),
                kind="joint" if joint else kind_of(node, root),
                form="circle" if joint else "box",
                tooltip=_tooltip(name, layer, shape_text(node), params, macs.get(node, 0), user_line(node)),
            )
        )
    place = {node: i for i, node in enumerate((*inputs, *flow.vertices))}
    edges = [(place[s], place[n]) for n in flow.vertices for s in flow.sources[n] if s in place]
    returned = [n for n in flow.sources if n in flow.returned and n in place]
    edges += [(place[n], len(vertices) + i) for i, n in enumerate(returned)]
    vertices += [_output(n, i if len(returned) > 1 else None) for i, n in enumerate(returned)]
    return Figure(title, tuple(vertices), tuple(dict.fromkeys(edges)))


def segment_figure(space: SearchSpace, removed: Iterable[str] = (), title: str = "Segment graph") -> Figure:
    """The segments; structures are candidates, those in ``removed`` are marked as redundant."""
    gone: Mapping[int, str] = {i: name for name in removed for i in space[name].segments}
    candidates = {i for s in space.structures for i in s.segments}
    live = space.validity.live(gone) if gone else set(range(len(space.graph)))
    macs = macs_per_node(space.trace)
    sizes = {name: p.numel() for name, p in space.model.named_parameters()}
    flow = DataFlow(space.trace)
    inputs = [n for n in flow.sources if n.op == "placeholder" and flow.readers[n]]
    vertices = [_input(n) for n in inputs]
    for segment in space.graph:
        status = "candidate" if segment.index in candidates else ""
        if segment.index in gone:
            status = "removed"
        elif segment.index not in live:
            status = "idle"
        vertices.append(_segment(segment, space, macs, sizes, status))
    first = len(inputs)
    edges = []
    for at, node in enumerate(inputs):
        edges += [
            (at, first + space.graph.segment_of[r]) for r in flow.readers[node] if r in space.graph.segment_of
        ]
    edges += [(first + s.index, first + i) for s in space.graph for i in s.outgoing]
    returned = [s for s in space.graph if s.feeds_output]
    edges += [(first + s.index, len(vertices) + i) for i, s in enumerate(returned)]
    vertices += [_output(s.nodes[-1], i if len(returned) > 1 else None) for i, s in enumerate(returned)]
    return Figure(title, tuple(vertices), tuple(dict.fromkeys(edges)))


def network_figure(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    title: str = "Sub-network",
) -> Figure:
    """The trace graph of any module, traced afresh on example inputs."""
    return trace_figure(trace(network, args, kwargs), title)


def _segment(
    segment: Segment, space: SearchSpace, macs: Mapping[fx.Node, int], sizes: Mapping[str, int], status: str
) -> Vertex:
    root = space.trace.graph_module
    params = sum(sizes.get(p, 0) for p in segment.parameters)
    work = sum(macs.get(n, 0) for n in segment.nodes)
    last = segment.nodes[-1]
    reason = {
        "candidate": "removable",
        "removed": "redundant: removed",
        "idle": "nothing rests on it any more",
    }
    words = reason.get(status) or f"stays: {space.kept.get(segment.name, 'part of the network')}"
    head = (
        f"{segment.name}\n{words}"
        if len(segment.nodes) == 1
        else f"{segment.name} ({len(segment.nodes)} nodes)\n{words}"
    )
    tooltip = _tooltip(head, None, shape_text(last), params, work, user_line(segment.nodes[0]))
    name = operator_name(segment.nodes[0])
    if segment.joint:
        return Vertex(
            GLYPHS.get(name, name),
            JOINTS.get(name, name),
            shape_text(last),
            "joint",
            "circle",
            tooltip=tooltip,
            status=status,
        )
    figures = [f"{quantity(params)} params"] if params else []
    figures += [f"{quantity(work)} MACs"] if work else []
    return Vertex(
        title=segment.name,
        detail=" · ".join(figures) or shape_text(last),
        kind="segment",
        strip=tuple(kind_of(n, root) for n in segment.nodes),
        tooltip=tooltip,
        status=status,
    )


def _input(node: fx.Node) -> Vertex:
    shape = shape_text(node)
    return Vertex(
        str(node.target),
        detail=shape,
        kind="io",
        form="pill",
        tooltip=f"input {node.target}\n{shape} per example",
    )


def _output(node: fx.Node, index: int | None) -> Vertex:
    name = "output" if index is None else f"output {index}"
    shape = shape_text(node)
    return Vertex(name, detail=shape, kind="io", form="pill", tooltip=f"{name}\n{shape} per example")


def _tooltip(name: str, layer: nn.Module | None, shape: str, params: int, macs: int, line: str) -> str:
    rows = [
        name,
        str(layer) if layer is not None and not list(layer.children()) else "",
        f"output {shape}" if shape else "",
    ]
    rows += [f"{params:,} parameters" if params else "", f"{macs:,} MACs per example" if macs else "", line]
    return "\n".join(row for row in rows if row)
