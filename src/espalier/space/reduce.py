"""What is left of the graph once a solution's structures are gone: ASGSSD, section 3.3, exact.

One pass over the trace evaluates it partially. Removed segments have become constants; removed channels and heads
leave the layers that make them; a joint vertex drops what changes nothing; what reads a narrowed tensor is narrowed;
what nothing reads any more goes. Where an operator cannot work on what is left, constants are put back. The full
model is never edited.
"""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from espalier.graph.axes import is_known_layer
from espalier.graph.constants import Constant
from espalier.graph.functional import drop_dead_code, is_in_place
from espalier.graph.lift import is_tensor
from espalier.graph.module import graph_module
from espalier.graph.segments import DataFlow, SegmentGraph
from espalier.graph.trace import Trace, root_for
from espalier.rules import RULES, Kept, Narrowed, Value
from espalier.rules.value import tensors_of, within
from espalier.space.narrowing import Narrowing

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
    narrowing: Narrowing,
) -> "Reduced":
    """The trace without the removed segments and indices, over the layers of ``model``.

    ``removed`` maps segments to their structures' names, ``constant`` gives what a removed segment yields;
    ``model`` is the traced one, or a copy, with the removed indices' parameters at zero. Layers that stay whole are
    shared with ``model``; narrowed ones are new.
    """
    whole: set[str] = set()
    while True:
        try:
            return _Builder(trace, graph, removed, constant, model, narrowing, whole).run()
        except _UsedDifferently as conflict:
            whole.add(conflict.path)


class _UsedDifferently(Exception):
    """A layer that is called several times cannot be narrowed alike for all its calls: it must stay whole."""

    def __init__(self, path: str):
        super().__init__(path)
        self.path = path


class _Builder:
    """Writes the sub-network's graph node by node; what :class:`espalier.rules.value.Build` asks for."""

    def __init__(
        self,
        trace: Trace,
        segments: SegmentGraph,
        removed: Mapping[int, str],
        constant: Callable[[int], Constant],
        model: nn.Module,
        narrowing: Narrowing,
        whole: set[str],
    ):
        self.trace, self.segments, self.removed, self.constant_of = trace, segments, removed, constant
        self.model, self.narrowing, self.layers_kept_whole = model, narrowing, whole
        self.sliced: dict[tuple[object, ...], nn.Parameter] = {}
        self.root = root_for(model, trace.graph)
        self.graph = fx.Graph()
        self.graph.set_codegen(copy.copy(trace.graph._codegen))
        self.at: fx.Node = next(iter(trace.graph.nodes))
        self.env: dict[fx.Node, Any] = {}  # a list for a node that returns several tensors
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
        if node.op == "get_attr":
            self.env[node] = self._attribute_of(node)
            return
        for source in node.all_input_nodes:
            self._constant_of(source)
        values = [self.env[n] for n in tensors_of(node)]
        if node.target is operator.getitem and isinstance(values[0], list):
            self.env[node] = values[0][node.args[1]]  # type: ignore[index]
            return
        plain = all(isinstance(v, fx.Node) for v in values)
        if plain and not self._loses(node):
            self.env[node] = self.copy(node, values)  # type: ignore[arg-type]
            return
        rule = self._rule(node)
        tensors = [v for n, v in zip(tensors_of(node), values, strict=True) if is_tensor(n)]
        made = rule(self, node, tensors) if rule is not None else None
        if made is None:
            made = self.copy(node, self._put_back(node, values))
        self.env[node] = made

    def _loses(self, node: fx.Node) -> bool:
        """Whether the solution takes something from the node's result or its layer's parameters."""
        if not self.narrowing or not node.op.startswith("call_"):
            return False
        if node.op == "call_function":
            return bool(self.kept(node)) or self._averages(node)
        names = [self.canonical[f"{node.target}.{n}"] for n, _ in self.module(node).named_parameters()]
        return bool(self.kept(node)) or self._averages(node) or any(map(self.narrowing.of_parameter, names))

    def _averages(self, node: fx.Node) -> bool:
        """Whether it takes statistics over an axis that loses something."""
        dims = self.narrowing.axes.statistics.get(node, ())
        return any(d in dims for d in self.kept(node.all_input_nodes[0])) if dims else False

    def _attribute_of(self, node: fx.Node) -> Value:
        """A parameter or buffer that the model reads itself; what is gone of it keeps its values as background."""
        whole = self.copy(node, [])
        kept = self.kept(node)
        if not kept:
            return whole
        tensor = operator.attrgetter(str(node.target))(self.root)
        value = Constant(tensor.detach(), tensor.detach())
        if isinstance(tensor, nn.Parameter):
            narrow, path = whole, str(node.target)
            cut = self._cut(self.canonical[path], tensor, kept)
            if any(path.startswith(f"{layer}.") for layer in self.calls):  # a layer's own: that layer stays as it is
                narrow = self.attribute(f"{node.name}_narrow", cut)
            else:
                self.added[path] = cut
        else:
            narrow = self.attribute(f"{node.name}_narrow", _box(tensor, kept))
        return Narrowed(narrow, kept, tuple(tensor.shape), value)

    def _rule(self, node: fx.Node) -> Callable[..., Value | None] | None:
        if node.op == "call_module":
            return None if str(node.target) in self.layers_kept_whole else self._layer_rule(node)
        for key in (node.target, str(node.target)):
            if key in RULES:
                return RULES[key]
        return RULES[torch.Tag.pointwise] if torch.Tag.pointwise in getattr(node.target, "tags", ()) else None

    def _layer_rule(self, node: fx.Node) -> Callable[..., Value | None] | None:
        module = self.module(node)
        if not is_known_layer(module):
            return RULES[nn.Dropout] if not any(True for _ in module.parameters()) and self._passes(node) else None
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

    def _passes(self, node: fx.Node) -> bool:
        """Whether the coupling took the layer for one that does nothing in eval mode."""
        labels, (source,) = self.narrowing.axes.labels.get(node), node.all_input_nodes
        return (
            labels is not None
            and any(a is not None for a in labels)
            and self.kept(node).keys() == self.kept(source).keys()
        )

    def put_back(self, value: Narrowed) -> fx.Node:
        """The whole tensor: what is still computed and the constants, in the old order."""
        now: fx.Node | Narrowed = value
        for dim in value.kept:
            assert isinstance(now, Narrowed)
            now = self.widen(now, dim)
        assert isinstance(now, fx.Node)
        return now

    def widen(self, value: Narrowed, dim: int, kept: torch.Tensor | None = None) -> "fx.Node | Narrowed":
        """The value with constants put back along ``dim``, up to ``kept`` (by default to the whole axis)."""
        source, ndim = value.node, len(value.shape)
        wanted = torch.arange(value.shape[dim]) if kept is None else kept
        more = wanted[~torch.isin(wanted, value.kept[dim])]
        if len(more):
            filler = within(value.background, value.kept | {dim: more}, ndim)
            like = source.meta["val"]
            filler = Constant(filler.evaluated.to(like.dtype), filler.trained.to(like.dtype))
            sizes = self._sizes_of(value)
            sizes[dim] = len(more)
            fill = self.call(aten.expand.default, self.constant(filler, source.name), sizes, val=like)
            source = self.call(aten.cat.default, [source, fill], dim, val=like)
            order = torch.cat([value.kept[dim], more]).argsort()
            if not torch.equal(order, torch.arange(len(order))):
                index = self.attribute(f"{value.node.name}_order", order)
                source = self.call(aten.index_select.default, source, dim, index, val=like)
        left = {d: k for d, k in value.kept.items() if d != dim}
        if len(wanted) < value.shape[dim]:
            left[dim] = wanted
        return Narrowed(source, left, value.shape, value.background) if left else source

    def _sizes_of(self, value: Narrowed) -> list[Any]:
        sizes: list[Any] = []
        for d, size in enumerate(value.node.meta["val"].shape):
            if d in value.kept:
                sizes.append(len(value.kept[d]))
            elif isinstance(size, int):
                sizes.append(value.shape[d])
            else:
                sizes.append(self.call(aten.sym_size.int, value.node, d, val=size))
        return sizes

    # What the rules ask for.

    def copy(self, node: fx.Node, inputs: Sequence[fx.Node]) -> fx.Node:
        replace = dict(zip(tensors_of(node), inputs, strict=False))
        return self.graph.node_copy(node, lambda n: replace.get(n) or self.env[n])  # type: ignore[arg-type,return-value]

    def kept(self, node: fx.Node) -> Kept:
        return self.narrowing.of(node)

    def kept_of(self, node: fx.Node, name: str) -> Kept:
        return self.narrowing.of_parameter(self.canonical[f"{node.target}.{name}"])

    def select(self, source: fx.Node, kept: Kept) -> fx.Node:
        for dim, index in kept.items():
            order = self.attribute(f"{source.name}_kept", index)
            source = self.call(aten.index_select.default, source, dim, order, val=source.meta["val"])
        return source

    def training(self) -> fx.Node:
        return self.graph.create_node("get_attr", "training")

    def added_layer(self, path: str, layer: nn.Module, source: fx.Node, val: Any) -> fx.Node:
        self.added[path] = layer
        new = self.graph.create_node("call_module", path, (source,))
        new.meta = {**self.at.meta, "val": source.meta["val"] if val is None else val}
        return new

    def call(self, target: Callable[..., Any], *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {**self.at.meta, "val": self.at.meta["val"] if val is None else val}
        return new

    def module(self, node: fx.Node) -> nn.Module:
        return self.module_at(str(node.target))

    def module_at(self, path: str) -> nn.Module:
        return self.root.get_submodule(path)

    def shared(self, node: fx.Node) -> bool:
        path = str(node.target)
        names = [self.canonical[f"{path}.{n}"] for n, _ in self.module(node).named_parameters()]
        return self.calls[path] > 1 or any(self.uses[n] > 1 for n in names)

    def slice(self, node: fx.Node, name: str, kept: Kept) -> nn.Parameter:
        return self._cut(self.canonical[f"{node.target}.{name}"], operator.attrgetter(name)(self.module(node)), kept)

    def _cut(self, name: str, parameter: nn.Parameter, kept: Kept) -> nn.Parameter:
        kept = {d: k for d, k in sorted(kept.items()) if len(k) < parameter.shape[d]}
        if not kept:
            return parameter
        key = (name, *((d, tuple(k.tolist())) for d, k in kept.items()))
        if key not in self.sliced:
            self.sliced[key] = nn.Parameter(_box(parameter.detach(), kept).clone(), parameter.requires_grad)
        return self.sliced[key]

    def install(self, node: fx.Node, layer: nn.Module, *sources: fx.Node) -> fx.Node:
        path = str(node.target)
        before = self.added.get(path)
        if isinstance(before, nn.Module):
            if any(p is not q for p, q in zip(before.parameters(), layer.parameters(), strict=True)):
                raise _UsedDifferently(path)
        else:
            self.added[path] = layer
        return self.copy(node, sources)

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
        self.added[unique] = tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone().to(device)
        node = self.graph.create_node("get_attr", unique)
        node.meta["val"] = self.added[unique]
        return node


def _set_attribute(root: nn.Module, path: str, value: nn.Module | torch.Tensor) -> None:
    *parents, name = path.split(".")
    owner = root
    for parent in parents:
        if not hasattr(owner, parent) or _is_gone(getattr(owner, parent)):
            setattr(owner, parent, nn.Module())
        owner = getattr(owner, parent)
    if isinstance(value, (nn.Module, nn.Parameter)):
        setattr(owner, name, value)
    else:
        owner.register_buffer(name, value)


def _is_gone(module: nn.Module) -> bool:
    """Attention is written out: what replaces it lies under its path."""
    return isinstance(module, nn.MultiheadAttention)


def _box(tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor
