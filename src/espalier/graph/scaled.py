"""Trainable scalars on what has no parameters: skips, pools, identities.

A structure is removed by driving its parameters to zero. A run of nodes without parameters, and a skip (an edge
straight into a joint vertex, beside others), have none: here each gets one scalar, at first 1, that multiplies its
output. From then on it is an ordinary segment with an ordinary parameter, for all that follows.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from espalier.errors import SpaceError
from espalier.graph.lift import stack_of
from espalier.graph.module import graph_module
from espalier.graph.segments import DataFlow, Segment, SegmentGraph, aten, segment_graph
from espalier.graph.trace import Trace, root_for

SCALARS = "scalars"


@dataclass(frozen=True, eq=False)
class Scaled:
    """``trace`` is that of the model with its scalars, which is ``trace.model``; its parameters are shared.

    ``refused`` maps the names of those that got no scalar to the reason.
    """

    trace: Trace
    graph: SegmentGraph
    refused: Mapping[str, str]


def scaled(trace: Trace, graph: SegmentGraph, protected: Collection[str] = ()) -> Scaled:
    """Multiply every removable run without parameters, and every skip, by one trainable scalar.

    >>> from espalier.graph.trace import trace
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stem, self.f = nn.Linear(4, 4), nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         x = self.stem(x)
    ...         return (x + self.f(x)).relu()
    >>> traced = trace(Block(), (torch.randn(3, 4),))
    >>> scaled(traced, segment_graph(traced)).trace.scalars
    ('scalars.stem_to_add',)

    A skip is an edge into a joint vertex from a vertex that others read as well and that is not removable
    itself. The parameters are ``scalars.<name>``, zero-dimensional, of the model's dtype and on its device.
    ``protected`` are dotted paths of modules in which nothing gets a scalar.
    """
    if hasattr(trace.model, SCALARS):
        raise SpaceError(
            f"the model has an attribute '{SCALARS}' of its own, which parameterless=True needs: rename it."
        )
    spots, refused = _spots(trace, graph, protected)
    new = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    output = new.graph_copy(trace.graph, twin)  # type: ignore[arg-type]
    new.output(output)
    new.set_codegen(copy.copy(trace.graph._codegen))
    some = next(trace.model.parameters())
    names: dict[fx.Node, str] = {}
    root = root_for(trace.model, trace.graph)
    holder = nn.Module()
    for spot in spots:
        attribute = _unique(spot.name, holder)
        holder.register_parameter(attribute, nn.Parameter(torch.ones((), dtype=_kind(some), device=some.device)))
        names[_insert(new, spot, twin, f"{SCALARS}.{attribute}", holder)] = spot.name
    if spots:
        root.add_module(SCALARS, holder)
    model = graph_module(root, new, type(trace.model).__name__)
    own = set(trace.model.modules())
    for module in model.modules():
        if module not in own:
            module.training = trace.model.training
    made = replace(
        trace, model=model, graph_module=model, scalars=tuple(f"{SCALARS}.{n}" for n, _ in holder.named_parameters())
    )
    names |= {twin[node]: graph[i].name for node, i in graph.segment_of.items()}
    return Scaled(made, _renamed(segment_graph(made), names), refused)


@dataclass(frozen=True, eq=False)
class _Spot:
    """The scalar multiplies what ``source`` hands to ``readers``."""

    name: str
    source: fx.Node
    readers: tuple[fx.Node, ...]
    place: fx.Node  # whose module it belongs to


def _spots(trace: Trace, graph: SegmentGraph, protected: Collection[str]) -> tuple[list[_Spot], dict[str, str]]:
    flow = DataFlow(trace)
    found: list[_Spot] = []
    refused: dict[str, str] = {}
    for spot in (*_runs(graph, flow), *_skips(graph, flow)):
        reason = _refuses(spot, protected)
        if reason:
            refused[spot.name] = reason
        else:
            found.append(spot)
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    return sorted(found, key=lambda spot: order[spot.source]), refused


def _runs(graph: SegmentGraph, flow: DataFlow) -> Iterator[_Spot]:
    """Removable segments, were it not for their lack of parameters."""
    for segment in graph:
        if not segment.parameters and _free(segment, graph):
            last = segment.nodes[-1]
            yield _Spot(segment.name, last, tuple(flow.readers[last]), last)


def _free(segment: Segment, graph: SegmentGraph) -> bool:
    """Whether only joint vertices need the segment."""
    only_joint = all(graph[i].joint for i in segment.outgoing)
    return not segment.joint and not segment.feeds_output and bool(segment.outgoing) and only_joint


def _skips(graph: SegmentGraph, flow: DataFlow) -> Iterator[_Spot]:
    for joint in graph:
        if not joint.joint:
            continue
        vertex = joint.nodes[0]
        for source in dict.fromkeys(flow.sources[vertex]):
            index = graph.segment_of.get(source)
            if index is not None and _free(graph[index], graph):
                continue
            others = set(flow.readers[source]) - {vertex}
            if others or source in flow.returned:
                name = source.name if index is None else graph[index].name
                yield _Spot(f"{name}->{joint.name}", source, (vertex,), vertex)


def _refuses(spot: _Spot, protected: Collection[str]) -> str:
    product = next((r for r in spot.readers if r.target is aten.mul.Tensor), None)
    if product is not None:
        return f"the product '{product.name}' would vanish without it"
    value = spot.source.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return "its values are no floating-point numbers"
    touched = {path for _, path in stack_of(spot.place)[-1:]}
    if spot.place.op == "call_module":
        touched.add(str(spot.place.target))
    if touched & set(protected):
        return f"protected by keep= ('{sorted(touched & set(protected))[0]}')"
    return ""


def _insert(graph: fx.Graph, spot: _Spot, twin: Mapping[fx.Node, fx.Node], target: str, holder: nn.Module) -> fx.Node:
    source = twin[spot.source]
    with graph.inserting_after(source):
        factor = graph.create_node("get_attr", target)
    with graph.inserting_after(factor):
        product = graph.call_function(aten.mul.Tensor, (source, factor))
    factor.meta = {"val": holder.get_parameter(target.rpartition(".")[2]).detach()}
    product.meta = {**spot.place.meta, "val": spot.source.meta["val"]}
    for reader in spot.readers:
        twin[reader].replace_input_with(source, product)
    return product


def _renamed(graph: SegmentGraph, names: Mapping[fx.Node, str]) -> SegmentGraph:
    """Every segment under the name that it had, or that its scalar has."""
    segments = tuple(replace(s, name=names[s.nodes[0]]) for s in graph)
    return SegmentGraph(segments, graph.segment_of)


def _unique(name: str, holder: nn.Module) -> str:
    plain = "".join(c if c.isalnum() else "_" for c in name.replace("->", "_to_"))
    unique, i = plain, 1
    while hasattr(holder, unique):
        unique, i = f"{plain}_{i}", i + 1
    return unique


def _kind(parameter: nn.Parameter) -> torch.dtype:
    return parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
