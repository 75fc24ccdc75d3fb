"""One graph for both modes, from one export in eval and one in train mode.

An export bakes ``self.training``. What differs between the two graphs is made to follow the module again: a
module that differs (drop path, a batch norm of one's own) is lifted whole, a scalar that differs (the flag of
a functional dropout) becomes an expression of ``self.training``.
"""

import contextlib
import operator
import sys
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from espalier.graph.lift import Call, boundary, calls, collapse, is_tensor, stack_of

# Layers of torch.nn that act differently in train mode.
_MODAL = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
)


# Parts of torch whose modules are not lifted as layers and read the mode.
_TORCH_READERS = ("torch.nn.utils", "torch.ao")


@contextlib.contextmanager
def watching_training() -> Iterator[list[str]]:
    """Collects the names of the modules of code outside of torch that read ``training`` of any ``nn.Module``.

    What is not in the list ran the same way as it would have in the other mode.
    """
    readers: list[str] = []

    def read(module: nn.Module) -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] != "torch" or caller.startswith(_TORCH_READERS):
            readers.append(caller)
        if "training" not in module.__dict__:
            raise AttributeError("training")
        return module.__dict__["training"]

    def write(module: nn.Module, mode: bool) -> None:
        module.__dict__["training"] = mode

    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield readers
    finally:
        del nn.Module.training


def leaves_modal_layers(model: nn.Module, graph: fx.Graph) -> bool:
    """Whether the lifted ``graph`` holds operators of a layer that acts differently in train mode."""
    modal = {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _MODAL)}
    left = (node for node in graph.nodes if node.op == "call_function" and is_tensor(node))
    return any(path in modal for node in left for _, path in stack_of(node)[-1:])


# Operators that change how a tensor lies in memory, not its values: one mode may need them where the other's
# kernels (attention with and without dropout) return another layout.
_LAYOUT = (torch.ops.aten.contiguous.default,)


def merge(evaluated: fx.Graph, trained: fx.Graph, model: nn.Module) -> str:
    """Make ``trained`` obey train/eval, in place; return '' or the reason why the two cannot be merged."""
    modules = dict(model.named_modules(remove_duplicate=False))
    other_outputs = _other_outputs(evaluated, trained)
    if other_outputs:
        return other_outputs
    left: list[fx.Node] = []
    right: list[fx.Node] = []
    for _ in range(8):
        only_trained = _mode_only(evaluated, trained)
        left, right = _compared(evaluated, set()), _compared(trained, only_trained)
        if [_signature(n) for n in left] == [_signature(n) for n in right]:
            pairs = list(zip(right, left, strict=True))
            _keep_layouts(evaluated, trained, pairs)
            return _follow_training(trained, pairs, only_trained)
        if not _lift_what_differs(evaluated, trained, modules):
            break
    differs = _first_difference(left, right)
    return f"its graph in train mode has other operators than in eval mode, first at {differs}"


def _compared(graph: fx.Graph, leave_out: set[fx.Node]) -> list[fx.Node]:
    return [
        n
        for n in graph.nodes
        if n.op.startswith("call_") and is_tensor(n) and n not in leave_out and n.target not in _LAYOUT
    ]


def _beneath(node: fx.Node) -> fx.Node:
    """The node whose values these are."""
    while node.target in _LAYOUT:
        node = node.all_input_nodes[0]
    return node


def _keep_layouts(evaluated: fx.Graph, trained: fx.Graph, pairs: list[tuple[fx.Node, fx.Node]]) -> None:
    """Make contiguous in ``trained`` what is made contiguous in ``evaluated``."""
    same = {other: node for node, other in pairs}
    for node in evaluated.nodes:
        source = same.get(_beneath(node)) if node.target in _LAYOUT else None
        if source is None or any(user.target in _LAYOUT for user in source.users):
            continue
        with trained.inserting_after(source):
            copy = trained.call_function(node.target, (source,))
        copy.meta = dict(source.meta)
        source.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)


def _signature(node: fx.Node) -> tuple[object, ...]:
    return node.op, node.target


def _first_difference(left: list[fx.Node], right: list[fx.Node]) -> str:
    for a, b in zip(left, right, strict=False):
        if _signature(a) != _signature(b):
            return f"'{(stack_of(b) or [('', '')])[-1][1] or '<root>'}' ({a.target} against {b.target})"
    longer = max(left, right, key=len)
    extra = longer[min(len(left), len(right))]
    return f"'{(stack_of(extra) or [('', '')])[-1][1] or '<root>'}' ({extra.target})"


def _mode_only(evaluated: fx.Graph, trained: fx.Graph) -> set[fx.Node]:
    """Lifted modules of the train graph whose call vanished altogether in eval mode (drop path)."""
    there = {key for node in evaluated.nodes for key, _ in stack_of(node)}
    return {
        n
        for n in trained.nodes
        if n.op == "call_module" and n.meta.get("lifted_whole") and n.meta["lifted_whole"] not in there
    }


def _lift_what_differs(evaluated: fx.Graph, trained: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Lift, in both graphs, the innermost module calls whose nodes differ; False if none could be."""
    in_eval, in_train = _by_innermost_call(evaluated), _by_innermost_call(trained)
    changed = False
    tried: set[str] = set()
    for key, (ancestry, signatures) in in_train.items():
        if key in in_eval and in_eval[key][1] == signatures:
            continue
        for outer_key, path in reversed(ancestry):
            if outer_key in tried or not path:
                break
            tried.add(outer_key)
            if _collapse_call(trained, outer_key, path, modules):
                _collapse_call(evaluated, outer_key, path, modules)
                changed = True
                break
    return changed


def _by_innermost_call(graph: fx.Graph) -> dict[str, tuple[list[tuple[str, str]], list[tuple[object, ...]]]]:
    found: dict[str, tuple[list[tuple[str, str]], list[tuple[object, ...]]]] = {}
    for node in graph.nodes:
        stack = stack_of(node)
        if node.op.startswith("call_") and is_tensor(node) and stack:
            found.setdefault(stack[-1][0], (stack, []))[1].append(_signature(node))
    return found


def _collapse_call(graph: fx.Graph, key: str, path: str, modules: dict[str, nn.Module]) -> bool:
    for call in calls(graph, {path: modules[path]}):
        if call.key == key and not all(n.op == "call_module" and n.target == path for n in call.nodes):
            _drop_updates(graph, call)
            lifted = collapse(graph, call, modules[path])
            if lifted is not None:
                lifted.meta["lifted_whole"] = key
            return lifted is not None
    return False


def _drop_updates(graph: fx.Graph, call: Call) -> None:
    """Writes into the module's own buffers go with it: the lifted module does them itself."""
    _, outputs = boundary(call)
    for node in list(call.nodes):
        if not node.users and node not in outputs and node.op == "call_function":
            graph.erase_node(node)
            call.nodes.remove(node)


def _follow_training(graph: fx.Graph, pairs: list[tuple[fx.Node, fx.Node]], only_trained: set[fx.Node]) -> str:
    """Replace every scalar argument that differs between the modes; '' or why the graphs do not match."""
    same = dict(pairs)
    same |= dict(zip(_of(graph, "placeholder"), _of(pairs[0][1].graph, "placeholder"), strict=True)) if pairs else {}

    def counterpart(node: fx.Node) -> fx.Node | None:
        while node in only_trained or node.target in _LAYOUT:
            node = node.all_input_nodes[0]
        return same.get(node)

    training: fx.Node | None = None
    for node, other in pairs:
        _spell_out_defaults(node, other)
        flat, spec = pytree.tree_flatten((node.args, node.kwargs))
        flat_other, spec_other = pytree.tree_flatten((other.args, other.kwargs))
        if spec != spec_other:
            return f"the call of {node.target} has other arguments in train mode"
        for i, (a, b) in enumerate(zip(flat, flat_other, strict=True)):
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                if not is_tensor(a) and not is_tensor(b):
                    continue  # a size, which both modes compute alike
                if not (a.op == b.op == "get_attr" and a.target == b.target) and counterpart(a) is not _beneath(b):
                    return f"the call of {node.target} reads another tensor in train mode"
            elif type(a) is not type(b) or a != b:
                if isinstance(a, (fx.Node, torch.Tensor)) or isinstance(b, (fx.Node, torch.Tensor)):
                    return f"the call of {node.target} has other arguments in train mode"
                if node.target is torch.ops.aten.dropout.default:
                    same[_dropout_layer(graph, node)] = other
                    break
                training = training or _read_flag(graph)
                with graph.inserting_before(node):
                    flat[i] = training if (a, b) == (True, False) else _either(graph, b, a, training)
        else:
            node.args, node.kwargs = pytree.tree_unflatten(flat, spec)
    return ""


def _dropout_layer(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A functional dropout that follows the mode is a dropout layer."""
    with graph.inserting_before(node):
        layer = graph.call_module(f"functional_{node.name}", (node.args[0],))
    layer.meta = {**node.meta, "constant": nn.Dropout(node.args[1])}  # type: ignore[arg-type]
    node.replace_all_uses_with(layer)
    graph.erase_node(node)
    return layer


def _other_outputs(evaluated: fx.Graph, trained: fx.Graph) -> str:
    returned = [len(pytree.tree_leaves(_of(g, "output")[0].args)) for g in (evaluated, trained)]
    if returned[0] != returned[1]:
        return (
            f"it returns {returned[1]} tensors in train mode and {returned[0]} in eval mode; "
            f"the trace returns the latter"
        )
    return ""


def _spell_out_defaults(node: fx.Node, other: fx.Node) -> None:
    """Give both calls the same arguments, by the operator's own defaults."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or (len(node.args), set(node.kwargs)) == (len(other.args), set(other.kwargs)):
        return
    for call in (node, other):
        given = dict(zip((a.name for a in schema.arguments), call.args, strict=False)) | dict(call.kwargs)
        needed = [a for a in schema.arguments if not a.kwarg_only][: max(len(node.args), len(other.args))]
        keywords = set(node.kwargs) | set(other.kwargs)
        call.args = tuple(given.get(a.name, a.default_value) for a in needed)
        call.kwargs = {
            a.name: given.get(a.name, a.default_value) for a in schema.arguments[len(needed) :] if a.name in keywords
        }


def _of(graph: fx.Graph, op: str) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == op]


def _read_flag(graph: fx.Graph) -> fx.Node:
    """``training = self.training`` in the generated code."""
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr("training")
    node.meta["val"] = True
    return node


def _either(graph: fx.Graph, in_eval: object, in_train: object, training: fx.Node) -> fx.Node:
    node = graph.call_function(operator.getitem, ((in_eval, in_train), training))  # type: ignore[arg-type]
    node.meta["val"] = in_train
    return node
