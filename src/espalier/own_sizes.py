"""The model's own class over narrower layers: the layers in their places, and the sizes that its forward code keeps.

Forward code that takes its sizes from tensors works at once. Where it reads them from attributes (``num_heads``),
the literals of the trace that have changed say which: an attribute of the module around such an operator that
equals the old size gets the new one. Whether the guess was right is found by comparison.
"""

from collections.abc import Iterator

import torch
from torch import fx, nn

from espalier.graph.lift import stack_of
from espalier.graph.module import shallow
from espalier.graph.trace import Trace
from espalier.rules import Narrowed
from espalier.space.reduce import Reduced


def in_place(trace: Trace, model: nn.Module, small: Reduced) -> nn.Module | None:
    """A copy of ``model`` with every layer, parameter and size that differs replaced.

    None if the sub-network has an operator that the model has not, or lacks a layer that the model calls.
    """
    if any(_is_new(node) for node in small.module.graph.nodes) or _calls(trace.graph) - _calls(small.module.graph):
        return None
    whole = with_own_tree(model)
    before = dict(model.named_modules(remove_duplicate=False))
    for path, layer in small.module.named_modules(remove_duplicate=False):
        if path and path in before and type(layer) is not nn.Module and layer is not before[path]:
            set_at(whole, path, layer)
    _take_parameters(whole, small.module)
    for path, old, new in _changed_sizes(trace, small):
        _resize(whole, path, old, new)
    return whole


def _calls(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _is_new(node: fx.Node) -> bool:
    """An operator or a constant that the model's own code does not have."""
    return node.op == "get_attr" and str(node.target).startswith("constant_")


def _take_parameters(whole: nn.Module, small: nn.Module) -> None:
    """Parameters and buffers that the model reads itself."""
    mine = dict(whole.named_parameters(remove_duplicate=False))
    for name, parameter in small.named_parameters(remove_duplicate=False):
        if name in mine and mine[name].shape != parameter.shape:
            set_at(whole, name, parameter)


def _changed_sizes(trace: Trace, small: Reduced) -> Iterator[tuple[str, int, int]]:
    """(path of a module around the operator, size in the trace, size now), innermost modules first."""
    for node in trace.graph.nodes:
        now = small.value_of.get(node)
        new = now.node if isinstance(now, Narrowed) else now
        if node.op != "call_function" or not isinstance(new, fx.Node) or new.target is not node.target:
            continue
        for old_size, new_size in zip(_literals(node), _literals(new), strict=False):
            if old_size != new_size:
                paths = [path for _, path in stack_of(node) if path]
                for path in reversed(paths):
                    yield path, old_size, new_size


def _literals(node: fx.Node) -> list[int]:
    found: list[int] = []

    def walk(argument: object) -> None:
        if isinstance(argument, (list, tuple)):
            for each in argument:
                walk(each)
        elif isinstance(argument, int) and not isinstance(argument, bool):
            found.append(argument)
        elif isinstance(argument, fx.Node):
            found.append(-2)  # a size that is computed: keeps the places aligned

    walk(node.args[1:])
    return found


def _resize(whole: nn.Module, path: str, old: int, new: int) -> None:
    module = whole.get_submodule(path)
    if type(module).__module__.startswith("torch.nn.modules"):
        return
    for name, value in list(vars(module).items()):
        if name.startswith("_"):
            continue
        if type(value) is int and value == old:
            setattr(module, name, new)
        elif type(value) is tuple and old in value and all(type(v) is int for v in value):
            setattr(module, name, tuple(new if v == old else v for v in value))


def with_own_tree(model: nn.Module) -> nn.Module:
    """Copies of all containers over the same layers, so that editing the tree leaves ``model`` alone."""
    model = shallow(model)
    for name, child in model._modules.items():
        if child is not None and any(True for _ in child.children()) and not isinstance(child, fx.GraphModule):
            model._modules[name] = with_own_tree(child)
    return model


def set_at(root: nn.Module, path: str, value: object) -> None:
    """Put a module, a parameter or a buffer at a dotted path."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if isinstance(value, nn.Module):
        shell = type(value) is nn.Module  # of the graph's tree of names: not a layer
        if not (shell and isinstance(getattr(root, name, None), nn.Module)):
            root._modules[name] = value
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    elif isinstance(value, torch.Tensor):
        root.register_buffer(name, value)
