"""The sub-network as an instance of the model's own class, where that class can express it.

The forward code of most containers calls blocks that each take one tensor and return one. If all that has
changed lies inside such blocks, only these are replaced (by small graphs over their own layers), and the model
around them keeps its class, its forward code and the names of its parameters.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from espalier.graph.lift import Call, boundary, is_tensor, stack_of
from espalier.graph.module import graph_module
from espalier.graph.trace import Trace
from espalier.modes import evaluating
from espalier.own_sizes import in_place, set_at, with_own_tree
from espalier.rules import Narrowed, Value
from espalier.rules.value import tensors_of
from espalier.space.reduce import Reduced


def in_own_class(trace: Trace, model: nn.Module, small: Reduced) -> nn.Module | None:
    """``model`` (a full copy) with its changed blocks replaced, or None where that is not possible.

    The result is compared with ``small`` on the example inputs; None unless the outputs are equal.
    """
    narrowed = in_place(trace, model, small)
    if narrowed is not None and _agree(trace, narrowed, small.module) and _trains(trace, narrowed):
        return narrowed
    blocks = _blocks_to_replace(trace, small)
    if blocks is None:
        return None
    whole = with_own_tree(model)
    for path, layer in small.module.named_modules(remove_duplicate=False):
        if path and not any(path == b.path or path.startswith(f"{b.path}.") for b in blocks):
            set_at(whole, path, layer)
    for block in blocks:
        set_at(whole, block.path, _block_module(block, small, trace))
    return whole if _agree(trace, whole, small.module) and _trains(trace, whole) else None


@dataclass(frozen=True)
class _Block:
    """One call of one module, seen in the trace: what it reads and what it returns."""

    path: str
    nodes: tuple[fx.Node, ...]
    source: fx.Node
    result: fx.Node


def _blocks_to_replace(trace: Trace, small: Reduced) -> list[_Block] | None:
    there = set(small.module.graph.nodes)
    calls, count = _calls(trace)
    chosen: dict[str, _Block] = {}
    refused: set[str] = set()
    for node in trace.graph.nodes:
        if node.op == "placeholder" or (not is_tensor(node) and node.op != "output") or _unchanged(node, small, there):
            continue
        if node.op == "output" or any(key in chosen for key, _ in stack_of(node)):
            if node.op == "output":
                return None
            continue
        for key, path in reversed(stack_of(node)):
            if key in refused or not path:
                continue
            block = _as_block(calls[key], count[path], small, there)
            if block is not None:
                chosen[key] = block
                break
            refused.add(key)
        else:
            return None
    keys = set(chosen)
    return [b for key, b in chosen.items() if not any(k in keys for k, _ in stack_of(b.nodes[0]) if k != key)]


def _calls(trace: Trace) -> tuple[dict[str, Call], dict[str, int]]:
    calls: dict[str, Call] = {}
    for node in trace.graph.nodes:
        if node.op.startswith("call_"):
            for key, path in stack_of(node):
                calls.setdefault(key, Call(key, path)).nodes.append(node)
    count: dict[str, int] = {}
    for call in calls.values():
        count[call.path] = count.get(call.path, 0) + 1
    return calls, count


def _unchanged(node: fx.Node, small: Reduced, there: set[fx.Node]) -> bool:
    """Whether the sub-network still does at this node what the model did."""
    if node.op == "output":
        return True
    new = _now(small.value_of.get(node))
    if new is None or new not in there or new.op != node.op or new.target != node.target:
        return node.op == "get_attr"
    old_inputs, new_inputs = tensors_of(node), tensors_of(new)
    if len(old_inputs) != len(new_inputs):
        return False
    pairs = zip(old_inputs, new_inputs, strict=True)
    return all(_now(small.value_of.get(a)) is b for a, b in pairs if is_tensor(a))


def _now(value: Value | None) -> fx.Node | None:
    return value.node if isinstance(value, Narrowed) else value if isinstance(value, fx.Node) else None


def _as_block(call: Call, times: int, small: Reduced, there: set[fx.Node]) -> _Block | None:
    """The call as a block of one tensor in and one out, if it is one in the trace and in the sub-network."""
    inputs, outputs = boundary(call)
    if times > 1 or len(inputs) != 1 or len(outputs) != 1:
        return None
    source, result = _now(small.value_of.get(inputs[0])), _now(small.value_of.get(outputs[0]))
    if source is None or result is None or result not in there:
        return None
    inside = _between(source, result)
    if inside is None:
        return None
    for node in inside:
        if node.op in ("call_module", "get_attr") and not _belongs(str(node.target), call.path):
            return None
    return _Block(call.path, tuple(call.nodes), inputs[0], outputs[0])


def _belongs(target: str, path: str) -> bool:
    return target == "training" or target.startswith((f"{path}.", "constant_"))


def _between(source: fx.Node, result: fx.Node) -> list[fx.Node] | None:
    """The nodes that make ``result`` of ``source`` alone, in order; None if something else enters."""
    pending, found = [result], set()
    while pending:
        node = pending.pop()
        if node is source or node in found:
            continue
        if node.op == "placeholder":
            return None
        if node.target is torch.ops.aten.sym_size.int:
            size, value = str(node.meta.get("val")), source.meta.get("val")
            if not isinstance(value, torch.Tensor) or size not in [str(s) for s in value.shape]:
                return None
            found.add(node)
            continue
        found.add(node)
        pending += node.all_input_nodes
    return [n for n in source.graph.nodes if n in found]


def _block_module(block: _Block, small: Reduced, trace: Trace) -> nn.Module:
    source, result = _now(small.value_of[block.source]), _now(small.value_of[block.result])
    assert source is not None
    assert result is not None
    if source is result:
        return nn.Identity()
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    x.meta = dict(source.meta)
    new: dict[fx.Node, fx.Node] = {source: x}
    for node in _between(source, result) or ():
        if node.target is torch.ops.aten.sym_size.int:
            dim = [str(s) for s in source.meta["val"].shape].index(str(node.meta["val"]))
            new[node] = graph.call_function(torch.ops.aten.sym_size.int, (x, dim))
            continue
        copied = new[node] = graph.node_copy(node, lambda n: new[n])
        if node.op in ("call_module", "get_attr") and node.target != "training":
            value: object = small.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            copied.target = str(node.target).removeprefix(f"{block.path}.")
            set_at(root, copied.target, value)
    graph.output(new[result])
    module = graph_module(root, graph, type(trace.model.get_submodule(block.path)).__name__)
    module.training = trace.model.get_submodule(block.path).training
    return module


def _agree(trace: Trace, whole: nn.Module, lifted: nn.Module) -> bool:
    try:
        with torch.no_grad(), evaluating(whole, lifted):
            outputs = [_tensors(module(*trace.args, **trace.kwargs)) for module in (whole, lifted)]
    except Exception:
        return False  # the forward code wants something that the blocks do not have
    return _same(*outputs)


def _trains(trace: Trace, whole: nn.Module) -> bool:
    """Whether what the trace has not seen (heads for training) still fits the replaced blocks."""
    traced = {name for name, _ in trace.graph_module.named_parameters(remove_duplicate=False)}
    if all(name in traced for name, _ in trace.model.named_parameters()):
        return True
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(whole).train()(*trace.args, **trace.kwargs)
    except Exception:
        return False
    return True


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _same(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x, y, 1e-5, 1e-6, True) for x, y in zip(a, b, strict=True)
    )
