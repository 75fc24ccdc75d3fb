"""In-place operators made safe: each becomes its functional form, and later reads see the new value.

A write through a view (``y[:, :2].mul_(2)``) is carried back to the tensor that it views by a scatter, and
views that were made before the write are made anew where they are read after it.
"""

import operator
from collections.abc import Callable

import torch
from torch import fx

from espalier.errors import TraceError
from espalier.graph.source import where

aten = torch.ops.aten

# How the new value of a view gives the new value of the tensor that it views.
_SHAPE_ONLY = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
}


def _write_back(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node | None:
    """The new value of ``parent`` once ``view`` of it has become ``new``; None if the view is unknown."""
    target, args = view.target, view.args
    if target in _SHAPE_ONLY:
        return graph.call_function(aten.view_as.default, (new, parent))
    if target is aten.slice.Tensor:
        return graph.call_function(aten.slice_scatter.default, (parent, new, *args[1:]))
    if target is aten.select.int:
        return graph.call_function(aten.select_scatter.default, (parent, new, *args[1:]))
    if target is aten.diagonal.default:
        return graph.call_function(aten.diagonal_scatter.default, (parent, new, *args[1:]))
    if target is aten.transpose.int:
        return graph.call_function(aten.transpose.int, (new, *args[1:]))
    if target in (aten.t.default, aten.numpy_T.default):
        return graph.call_function(target, (new,))
    if target is aten.permute.default:
        dims = [d % len(args[1]) for d in args[1]]  # type: ignore[arg-type]
        return graph.call_function(aten.permute.default, (new, [dims.index(i) for i in range(len(dims))]))
    return None


def drop_dead_code(graph: fx.Graph) -> None:
    """Erase what nothing reads, except inputs and writes into the model's buffers."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or is_in_place(node))


def is_in_place(node: fx.Node) -> bool:
    """Whether the node writes into its first argument."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable or not schema.arguments:
        return False
    info = schema.arguments[0].alias_info
    return info is not None and info.is_write


def _functional(node: fx.Node) -> Callable[..., torch.Tensor] | None:
    namespace, name = node.target._schema.name.split("::")  # type: ignore[union-attr]
    if name == "zero_":
        return aten.zeros_like.default
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = node.target._schema.overload_name or "default"  # type: ignore[union-attr]
    return getattr(packet, overload, None) if name.endswith("_") else None


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


class _Functionalizer:
    """One pass over a graph. ``now`` maps a node to the node that holds its present value."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.parent: dict[fx.Node, fx.Node] = {}
        self.aliases: dict[int, list[fx.Node]] = {}
        self.now: dict[fx.Node, fx.Node] = {}
        self.stale: set[fx.Node] = set()

    def run(self) -> None:
        for node in list(self.graph.nodes):
            original = node.args[0] if node.args else None
            with self.graph.inserting_before(node):
                node.args = fx.map_arg(node.args, self.read)
                node.kwargs = fx.map_arg(node.kwargs, self.read)
            self.register(node, original)
            if is_in_place(node) and isinstance(original, fx.Node) and self.root(original).op != "get_attr":
                self.out_of_place(node)
                with self.graph.inserting_after(node):
                    self.write(original, node)
                self.now[node] = node
                self.stale.discard(node)

    def out_of_place(self, node: fx.Node) -> None:
        functional = _functional(node)
        if functional is not None:
            node.target = functional
            return
        with self.graph.inserting_before(node):  # random fills have no functional form: write into a copy
            copy = self.graph.call_function(aten.clone.default, (node.args[0],))
        copy.meta = dict(node.meta)
        node.args = (copy, *node.args[1:])

    def register(self, node: fx.Node, original: object) -> None:
        storage = _storage(node)
        if storage is None:
            return
        self.aliases.setdefault(storage, []).append(node)
        if isinstance(original, fx.Node) and _storage(original) == storage and node.op == "call_function":
            self.parent[node] = original

    def root(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def read(self, node: fx.Node) -> fx.Node:
        if node in self.stale:
            parent = self.parent.get(node)
            if parent is None or node.target is operator.getitem:
                raise TraceError(
                    f"{where(node)}: this view is read after the tensor behind it was written in place, and "
                    f"the operator {node.target} cannot be replayed. Use the out-of-place operator instead."
                )
            if is_in_place(node) or node.meta.get("written_in_place"):
                self.now[node] = self.read(parent)
            else:
                source = self.read(parent)
                fresh = self.graph.node_copy(node, lambda n: n)
                fresh.args = (source, *node.args[1:])
                self.now[node] = fresh
            self.stale.discard(node)
        return self.now.get(node, node)

    def write(self, target: fx.Node, new: fx.Node) -> None:
        """``target`` has become ``new``: tell every alias of its storage."""
        new.meta["written_in_place"] = True
        fresh = {new}
        while True:
            fresh.add(target)
            self.now[target] = new
            self.stale.discard(target)
            parent = self.parent.get(target)
            if parent is None:
                break
            if target.meta.get("written_in_place"):
                target = parent
                continue
            with self.graph.inserting_after(new):
                back = _write_back(self.graph, target, self.now.get(parent, parent), new)
            if back is None:
                raise TraceError(
                    f"{where(target)}: a write in place through the view {target.target} is not supported. "
                    f"Use the out-of-place operator instead."
                )
            back.meta = {k: v for k, v in new.meta.items() if k != "written_in_place"}
            back.meta["val"] = parent.meta.get("val")
            target, new = parent, back
        self.stale.update(n for n in self.aliases.get(_storage(target) or 0, ()) if n not in fresh)


def functionalize(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place so that no operator writes into a tensor that something else reads.

    Writes into the model's buffers (counters, running averages) are meant and stay.
    """
    if any(is_in_place(node) for node in graph.nodes):
        _Functionalizer(graph).run()
    drop_dead_code(graph)
