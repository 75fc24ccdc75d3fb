"""What is left of the graph once a solution's structures are gone: ASGSSD, section 3.3, exact.

One pass over the trace evaluates it partially. Removed segments have become constants; a joint vertex drops
those that change nothing; what reads a concatenation is narrowed; what nothing reads any more goes. The full
model is never edited.
"""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from espalier.graph.constants import Constant
from espalier.graph.functional import drop_dead_code, is_in_place
from espalier.graph.lift import is_tensor
from espalier.graph.module import graph_module
from espalier.graph.segments import DataFlow, SegmentGraph
from espalier.graph.trace import Trace, root_for
from espalier.rules import RULES, Narrowed, Value
from espalier.rules.value import tensors_of

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Reduced:
    """The reduced graph as a module, and what has become of every node of the trace that it still rests on."""

    module: fx.GraphModule
    value_of: Mapping[fx.Node, Value]


def reduced(
    trace: Trace,
    graph: SegmentGraph,
    removed: Mapping[int, str],
    constant: Callable[[int], Constant],
    model: nn.Module,
) -> "Reduced":
    """The trace without the removed segments, over the layers of ``model`` (a copy of the traced one, or itself).

    ``removed`` maps segments to their structures' names, ``constant`` gives what a removed segment yields.
    Layers that stay whole are shared with ``model``; narrowed ones are new.
    """
    return _Builder(trace, graph, removed, constant, model).run()


class _Builder:
    """Writes the sub-network's graph node by node; what :class:`espalier.rules.value.Build` asks for."""

    def __init__(
        self,
        trace: Trace,
        segments: SegmentGraph,
        removed: Mapping[int, str],
        constant: Callable[[int], Constant],
        model: nn.Module,
    ):
        self.trace, self.segments, self.removed, self.constant_of = trace, segments, removed, constant
        self.model = model
        self.root = root_for(model, trace.graph)
        self.graph = fx.Graph()
        self.graph.set_codegen(copy.copy(trace.graph._codegen))
        self.at: fx.Node = next(iter(trace.graph.nodes))
        self.env: dict[fx.Node, Value] = {}
        self.added: dict[str, nn.Module | torch.Tensor] = {}
        self.calls: dict[str, int] = {}
        self.uses: dict[str, int] = {}
        for node in trace.graph.nodes:
            if node.op == "call_module":
                self.calls[str(node.target)] = self.calls.get(str(node.target), 0) + 1
        flow = DataFlow(trace)
        for names in flow.parameters.values():
            for name in names:
                self.uses[name] = self.uses.get(name, 0) + 1
        self.canonical = flow.names

    def run(self) -> Reduced:
        wanted = self._wanted()
        for node in self.trace.graph.nodes:
            if node.op in ("placeholder", "output") or node in wanted:
                self._emit(node)
        drop_dead_code(self.graph)
        for path, value in self.added.items():
            _set_attribute(self.root, path, value)
        small = graph_module(self.root, self.graph, type(self.model).__name__)
        small.training = self.model.training
        return Reduced(small, self.env)

    def _wanted(self) -> set[fx.Node]:
        """Nodes that an output or a lasting effect still rests on."""
        gone = {n for i in self.removed for n in self.segments[i].nodes}
        pending = [n for n in self.trace.graph.nodes if n.op == "output" or is_in_place(n)]
        found: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in found and node not in gone:
                found.add(node)
                pending += node.all_input_nodes
        return found

    def _emit(self, node: fx.Node) -> None:
        self.at = node
        for source in node.all_input_nodes:
            self._constant_of(source)
        values = [self.env[n] for n in tensors_of(node)]
        if all(isinstance(v, fx.Node) for v in values):
            self.env[node] = self.copy(node, values)  # type: ignore[arg-type]
            return
        rule = RULES.get(node.target) if node.op != "call_module" else self._layer_rule(node)
        tensors = [v for n, v in zip(tensors_of(node), values, strict=True) if is_tensor(n)]
        made = rule(self, node, tensors) if rule is not None else None
        if made is None:
            made = self.copy(node, self._put_back(node, values))
        self.env[node] = made

    def _layer_rule(self, node: fx.Node) -> Callable[..., Value | None] | None:
        module = self.module(node)
        if not type(module).forward.__module__.startswith("torch.nn.modules"):
            return None
        return next((RULES[c] for c in type(module).__mro__ if c in RULES), None)

    def _constant_of(self, node: fx.Node) -> None:
        segment = self.segments.segment_of.get(node, -1)
        if node not in self.env and segment in self.removed:
            self.env[node] = self.constant_of(segment)

    def _put_back(self, node: fx.Node, values: Sequence[Value]) -> list[fx.Node]:
        """All inputs as whole tensors, constants included."""
        whole = {n: v for n, v in zip(tensors_of(node), values, strict=True) if isinstance(v, fx.Node)}
        like = next(((n, v) for n, v in whole.items() if is_tensor(n)), None)
        return [self._whole(n, v, like) for n, v in zip(tensors_of(node), values, strict=True)]

    def _whole(self, old: fx.Node, value: Value, like: tuple[fx.Node, fx.Node] | None) -> fx.Node:
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, Narrowed):
            return self.put_back(value)
        shape = old.meta["val"].shape
        sizes = [s if isinstance(s, int) else self._size(s, like) for s in shape]
        return self.call(aten.expand.default, self.constant(value, old.name), sizes, val=old.meta["val"])

    def _size(self, symbol: Any, like: tuple[fx.Node, fx.Node] | None) -> fx.Node:
        """A node that computes a symbolic size: the size of an input, or of a neighbouring tensor."""
        places = [(n, v) for n, v in self.env.items() if n.op == "placeholder" and isinstance(v, fx.Node)]
        for old, new in (*places, *([like] if like else [])):
            value = old.meta.get("val")
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if str(size) == str(symbol):
                        return self.call(aten.sym_size.int, new, dim, val=size)
        for old, new in self.env.items():
            if isinstance(new, fx.Node) and str(old.meta.get("val")) == str(symbol):
                return new
        return int(symbol)  # type: ignore[return-value]  # the export has fixed it

    def put_back(self, value: Narrowed) -> fx.Node:
        """The whole tensor: what is still computed and the constants, in the old order."""
        source, ndim = value.node, value.node.meta["val"].ndim
        dynamic = source.meta["val"].shape
        sizes: list[Any] = [
            s if isinstance(s, int) else self.call(aten.sym_size.int, source, d, val=s) for d, s in enumerate(dynamic)
        ]
        sizes[value.dim] = len(value.gone)
        shape = [1] * ndim
        shape[value.dim] = -1
        dtype = source.meta["val"].dtype
        filler = Constant(value.fill.evaluated.to(dtype).reshape(shape), value.fill.trained.to(dtype).reshape(shape))
        like = source.meta["val"]
        fill = self.call(aten.expand.default, self.constant(filler, source.name), sizes, val=like)
        joined = self.call(aten.cat.default, [source, fill], value.dim, val=like)
        order = torch.cat([value.kept, value.gone]).argsort()
        if torch.equal(order, torch.arange(value.total)):
            return joined
        index = self.attribute(f"{source.name}_order", order)
        return self.call(aten.index_select.default, joined, value.dim, index, val=like)

    # What the rules ask for.

    def copy(self, node: fx.Node, inputs: Sequence[fx.Node]) -> fx.Node:
        replace = dict(zip(tensors_of(node), inputs, strict=False))
        return self.graph.node_copy(node, lambda n: replace.get(n) or self.env[n])  # type: ignore[arg-type,return-value]

    def call(self, target: Callable[..., Any], *args: Any, val: Any = None) -> fx.Node:
        new = self.graph.call_function(target, args)
        new.meta = {**self.at.meta, "val": self.at.meta["val"] if val is None else val}
        return new

    def module(self, node: fx.Node) -> nn.Module:
        return self.module_at(str(node.target))

    def module_at(self, path: str) -> nn.Module:
        return self.root.get_submodule(path)

    def narrow_module(self, node: fx.Node, module: nn.Module, source: fx.Node) -> fx.Node | None:
        """Put ``module`` in the place of the node's layer; None if the layer or its weights serve elsewhere too."""
        path = str(node.target)
        names = [self.canonical[f"{path}.{n}"] for n, _ in self.module(node).named_parameters()]
        if self.calls[path] > 1 or any(self.uses[n] > 1 for n in names):
            return None
        self.added[path] = module
        return self.graph.node_copy(node, lambda n: source)

    def constant(self, value: Constant, name: str) -> fx.Node:
        if value.alike:
            return self.attribute(f"constant_{name}", value.evaluated)
        pair = [
            self.attribute(f"constant_{name}_{mode}", tensor)
            for mode, tensor in (("eval", value.evaluated), ("train", value.trained))
        ]
        flag = self.graph.create_node("get_attr", "training")
        return self.call(operator.getitem, tuple(pair), flag, val=value.evaluated)

    def attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        unique, i = name, 1
        while unique in self.added or hasattr(self.root, unique):
            unique, i = f"{name}_{i}", i + 1
        device = next(self.model.parameters()).device
        self.added[unique] = tensor.detach().clone().to(device)
        node = self.graph.create_node("get_attr", unique)
        node.meta["val"] = self.added[unique]
        return node


def _set_attribute(root: nn.Module, path: str, value: nn.Module | torch.Tensor) -> None:
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(value, nn.Module):
        setattr(owner, name, value)
    else:
        owner.register_buffer(name, value)
