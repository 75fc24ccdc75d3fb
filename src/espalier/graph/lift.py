"""ATen nodes back onto the model's own layers.

``torch.export`` opens every module. Here the nodes of one call of a ``torch.nn`` layer become one
``call_module`` on the model's own layer, so that the graph keeps the layer's behaviour (train/eval, hooks)
and the names of its parameters.
"""

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

# Layers with several inputs or outputs: lifted by the call signature that torch.export preserves for them.
SIGNATURE_LAYERS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


@dataclass
class Call:
    """The nodes that one call of one module made. ``key`` differs between two calls of one module."""

    key: str
    path: str
    nodes: list[fx.Node] = field(default_factory=list)


def stack_of(node: fx.Node) -> list[tuple[str, str]]:
    """(call key, dotted path) of every module call around the node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, entry[0]) for key, entry in stack.items() if key != "_empty_nn_module_stack_from_metadata_hook"]


def is_layer(module: nn.Module) -> bool:
    """A ``torch.nn`` layer, or a subclass that keeps its forward: one tensor in, one tensor out."""
    forward = type(module).forward
    return (
        (forward.__module__ or "").startswith("torch.nn.modules")
        and not any(True for _ in module.children())
        and not isinstance(module, SIGNATURE_LAYERS)
        and not getattr(module, "return_indices", False)
    )


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is a tensor or a tuple of tensors (not a size, a flag or nothing)."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def calls(graph: fx.Graph, wanted: Mapping[str, nn.Module]) -> list[Call]:
    """The calls of the wanted modules (by dotted path), outermost first where they nest."""
    found: dict[str, Call] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        for key, path in stack_of(node):
            if path in wanted:
                found.setdefault(key, Call(key, path)).nodes.append(node)
                break
    return list(found.values())


def boundary(call: Call) -> tuple[list[fx.Node], list[fx.Node]]:
    """Tensors that enter the call (parameters and buffers aside) and what of it is read outside.

    A size that the call computed from sizes alone is no output, though later layers may read it: it stays
    where it is.
    """
    inside = set(call.nodes)
    inputs: dict[fx.Node, None] = {}
    for node in call.nodes:
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr" and is_tensor(source):
                inputs[source] = None
    read = [n for n in call.nodes if any(user not in inside for user in n.users)]
    return list(inputs), [n for n in read if is_tensor(n) or _rests_on_tensors(n, inside)]


def _rests_on_tensors(size: fx.Node, inside: Collection[fx.Node]) -> bool:
    pending = [size]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in inside and is_tensor(source):
                return True
            if source in inside:
                pending.append(source)
    return False


def _keeps_its_arguments(call: Call, module: nn.Module) -> bool:
    """False where the call passed what ``module(x)`` would not repeat (a transposed conv's size)."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        padding = next((n.args[5] for n in call.nodes if len(n.args) > 5), None)
        return padding is None or tuple(padding) == tuple(module.output_padding)  # type: ignore[arg-type]
    return True


def collapse(graph: fx.Graph, call: Call, module: nn.Module) -> fx.Node | None:
    """Replace the call's nodes by one ``call_module``; None (and no change) if it is not one in, one out."""
    inputs, outputs = boundary(call)
    if len(inputs) != 1 or len(outputs) != 1 or outputs[0].target is operator.getitem:
        return None
    if not _keeps_its_arguments(call, module):
        return None
    last = outputs[0]
    with graph.inserting_before(call.nodes[0]):
        lifted = graph.call_module(call.path, (inputs[0],))
    _take_place(lifted, last)
    _erase(graph, call.nodes)
    return lifted


def collapse_by_signature(
    graph: fx.Graph, call: Call, entry: "torch.export.ModuleCallEntry", named: dict[str, fx.Node]
) -> fx.Node | None:
    """The same for a layer with several inputs or outputs, by the signature that the export preserved.

    ``named`` maps the names that signatures use to the nodes that stand for them now.
    """
    signature = entry.signature
    if signature is None:
        return None
    values = [_argument(a, named) for a in signature.inputs]
    returned = [_argument(a, named) for a in signature.outputs]
    if any(v is _MISSING for v in values):
        return None
    _, outputs = boundary(call)
    if not set(outputs) <= {r for r in returned if isinstance(r, fx.Node)}:
        return None
    args, kwargs = pytree.tree_unflatten(values, signature.in_spec)
    with graph.inserting_before(call.nodes[0]):
        lifted = graph.call_module(call.path, args, kwargs)
        lifted.meta = dict(call.nodes[-1].meta)
        lifted.meta["val"] = tuple(o.meta["val"] for o in outputs)
        paths = pytree.tree_unflatten(list(range(len(returned))), signature.out_spec)
        for node in outputs:
            item = lifted
            for step in _path_to(paths, returned.index(node)):
                item = graph.call_function(operator.getitem, (item, step))
                item.meta = dict(node.meta)
            if item is lifted:
                lifted.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(item)
            named[node.name] = item
    _erase(graph, call.nodes)
    return lifted


_MISSING = object()


def _argument(argument: object, named: Mapping[str, fx.Node]) -> object:
    name = getattr(argument, "name", "")
    if hasattr(argument, "value"):
        return argument.value  # type: ignore[attr-defined]
    return named.get(name, _MISSING)


def _path_to(tree: object, leaf: int) -> list[int]:
    """Indices that lead to ``leaf`` in nested tuples."""
    if tree == leaf and not isinstance(tree, (tuple, list)):
        return []
    for i, item in enumerate(tree):  # type: ignore[arg-type]
        if leaf in pytree.tree_leaves(item):
            return [i, *_path_to(item, leaf)]
    raise LookupError(leaf)


def _take_place(lifted: fx.Node, last: fx.Node) -> None:
    lifted.meta = dict(last.meta)
    last.replace_all_uses_with(lifted)


def _erase(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    for node in reversed(list(nodes)):
        if not node.users:
            graph.erase_node(node)


def lift(graph: fx.Graph, model: nn.Module, signatures: Mapping[str, "torch.export.ModuleCallEntry"]) -> None:
    """Collapse every call of a layer of ``model`` in ``graph``, in place.

    ``signatures`` maps call keys without their prefix (``"encoder.attn@1"``) to preserved signatures.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    del modules[""]  # a model that is itself a layer stays as its operators
    named = {n.name: n for n in graph.nodes}
    named |= {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    wanted = {name: m for name, m in modules.items() if isinstance(m, SIGNATURE_LAYERS)}
    for call in calls(graph, wanted) if wanted else ():
        suffix = call.key.partition("@")[2]
        entry = signatures.get(call.path + (f"@{suffix}" if suffix else ""))
        if entry is not None:
            collapse_by_signature(graph, call, entry, named)
    layers = {name: m for name, m in modules.items() if is_layer(m)}
    for call in calls(graph, layers):
        collapse(graph, call, layers[call.path])
