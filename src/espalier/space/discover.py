"""Discovery of removable segments: Algorithm 2 of ASGSSD, lines 11 to 16."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from espalier.graph.constants import annihilator, constant_output, last_annihilator
from espalier.graph.lift import stack_of
from espalier.graph.segments import Segment, SegmentGraph
from espalier.graph.trace import Trace
from espalier.space.structure import Family, Slices


def segment_families(traced: Trace, graph: SegmentGraph, protected: set[str]) -> tuple[list[Family], dict[str, str]]:
    """A family per removable segment, and the reason why each other segment stays."""
    users: dict[str, list[int]] = {}
    for segment in graph:
        for name in segment.parameters:
            users.setdefault(name, []).append(segment.index)
    trainable = {name for name, p in traced.model.named_parameters() if p.requires_grad}
    aliases = _aliases(traced.model)
    families: list[Family] = []
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
        slices = tuple(Slices(p) for p in own)
        families.append(Family("segment", segment.name, 1, slices, segments=tuple(s.index for s in members)))
    return families, kept


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
        start = last_annihilator(traced, member.nodes, zeroed)
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
