"""A module tree as JSON, and back, without pickle.

Every module is written as its class (by name), its plain attributes and its children; a graph module as its
nodes. Reading it imports only classes and functions of packages that are allowed, and calls no constructor.
"""

import importlib
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from espalier.errors import FormatError
from espalier.graph.module import graph_module

ALLOWED = frozenset({"torch", "torchvision", "timm", "transformers", "espalier"})

_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_is_full_backward_hook"}
_GRAPH_INTERNALS = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) | {
    "_in_spec",
    "_out_spec",
    "_tracer_cls",
    "_tracer_extras",
    "forward",
    "shape_env",
}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)
_OPERATORS = {
    "getitem",
    "add",
    "sub",
    "mul",
    "floordiv",
    "truediv",
    "mod",
    "neg",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
}


def to_json(module: nn.Module, tensors: dict[str, torch.Tensor], path: str = "") -> dict[str, Any]:
    """Describe ``module``; its tensors are added to ``tensors``, shared ones once."""
    _refuse_hooks(module, path)
    known = {id(t): name for name, t in tensors.items()}
    described: dict[str, Any] = {"training": module.training, "parameters": {}, "buffers": {}, "modules": {}}
    for kind, own in (("parameters", module._parameters), ("buffers", module._buffers)):
        for name, tensor in own.items():
            if tensor is None:
                described[kind][name] = None
                continue
            key = known.setdefault(id(tensor), f"{path}.{name}" if path else name)
            tensors[key] = tensor
            described[kind][name] = {"tensor": key, "grad": tensor.requires_grad}
    described["transient"] = sorted(module._non_persistent_buffers_set)
    skip = _MODULE_INTERNALS
    if isinstance(module, fx.GraphModule):
        described["graph"] = _graph_to_json(module.graph, path)
        described["name"] = type(module).__name__
        skip = skip | _GRAPH_INTERNALS
    else:
        described["class"] = _name_of(type(module), path)
    described["attributes"] = {
        k: encode(v, f"attribute '{k}' of module '{path or '<root>'}'")
        for k, v in vars(module).items()
        if k not in skip
    }
    for name, child in module._modules.items():
        below = f"{path}.{name}" if path else name
        described["modules"][name] = None if child is None else to_json(child, tensors, below)
    return described


def from_json(described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], allow: Collection[str]) -> nn.Module:
    """Build what :func:`to_json` described, of allowed packages only."""
    return _build(described, tensors, frozenset(allow) | ALLOWED, {})


def build(described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The same for a description that is trusted (it came out of a pickle): any package may be imported."""
    return _build(described, tensors, None, {})


def _build(
    described: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    allow: frozenset[str] | None,
    made: dict[str, nn.Parameter],
) -> nn.Module:
    if "graph" in described:
        module = nn.Module()
    else:
        cls = _import(described["class"], allow)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise FormatError(f"'{described['class']}' is not a module class.")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
    for name, value in described["attributes"].items():
        module.__dict__[name] = decode(value, allow, {})
    for name, entry in described["parameters"].items():
        if entry is not None and entry["tensor"] not in made:
            made[entry["tensor"]] = nn.Parameter(tensors[entry["tensor"]], requires_grad=entry["grad"])
        module.register_parameter(name, None if entry is None else made[entry["tensor"]])
    for name, entry in described["buffers"].items():
        tensor = None if entry is None else tensors[entry["tensor"]]
        module.register_buffer(name, tensor, persistent=name not in described["transient"])
    for name, child in described["modules"].items():
        module.add_module(name, None if child is None else _build(child, tensors, allow, made))
    if "graph" in described:
        graph = _graph_from_json(described["graph"], allow)
        module = graph_module(module, graph, described["name"])
        for name, value in described["attributes"].items():
            module.__dict__[name] = decode(value, allow, {})
    module.training = described["training"]
    return module


def _refuse_hooks(module: nn.Module, path: str) -> None:
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise FormatError(
            f"module '{path or '<root>'}' has hooks, which are code and cannot be saved: remove them first."
        )


# Graphs.


def _graph_to_json(graph: fx.Graph, path: str) -> dict[str, Any]:
    nodes = []
    for node in graph.nodes:
        target = (
            encode(node.target, f"node '{node.name}' of '{path or '<root>'}'") if callable(node.target) else node.target
        )
        nodes.append([node.op, node.name, target, encode(node.args, node.name), encode(node.kwargs, node.name)])
    described: dict[str, Any] = {"nodes": nodes}
    info = getattr(graph._codegen, "pytree_info", None)
    if info is not None:
        described["arguments"] = list(info.orig_args)
        described["in"] = pytree.treespec_dumps(info.in_spec)
        described["out"] = None if info.out_spec is None else pytree.treespec_dumps(info.out_spec)
    return described


def _graph_from_json(described: Mapping[str, Any], allow: frozenset[str] | None) -> fx.Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs in described["nodes"]:
        if op not in ("placeholder", "get_attr", "call_function", "call_module", "output"):
            raise FormatError(f"unknown kind of node '{op}'.")
        function = target if isinstance(target, str) else decode(target, allow, made)
        made[name] = graph.create_node(op, function, decode(args, allow, made), decode(kwargs, allow, made), name)
    if "in" in described:
        specs = [None if s is None else pytree.treespec_loads(s) for s in (described["in"], described["out"])]
        info = _PyTreeInfo(described["arguments"], specs[0], specs[1])  # type: ignore[arg-type]
        graph.set_codegen(_PyTreeCodeGen(info))
    return graph


# Values.


def encode(value: Any, where: str) -> Any:
    """A JSON value that :func:`decode` turns back; raises :class:`FormatError` for anything that is not plain."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if (
        isinstance(value, torch.Size)
        or type(value) in (tuple, list)
        or isinstance(value, fx.immutable_collections.immutable_list)
    ):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(v, where) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encode(v, where) for k, v in value.items()}}
    if isinstance(value, (set, frozenset)):
        return {"set": [encode(v, where) for v in sorted(value)]}
    if isinstance(value, slice):
        return {"slice": [encode(v, where) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch._ops.OpOverload):
        return {"op": str(value)}
    name = getattr(value, "__name__", "")
    if name in _OPERATORS and getattr(operator, name) is value:
        return {"operator": name}
    if callable(value) and hasattr(value, "__qualname__"):
        return {"name": _name_of(value, where)}
    raise FormatError(
        f"{where} is a {type(value).__name__}, which cannot be saved without pickle. Save the state dict "
        f"(small.state_dict()) or export it (torch.export.save, espalier.export_onnx) instead."
    )


def decode(value: Any, allow: frozenset[str] | None, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse of :func:`encode`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind in ("tuple", "list", "set"):
        items = [decode(v, allow, nodes) for v in content]
        return {"tuple": tuple, "list": list, "set": set}[kind](items)
    if kind == "dict":
        return {k: decode(v, allow, nodes) for k, v in content.items()}
    if kind == "slice":
        return slice(*(decode(v, allow, nodes) for v in content))
    if kind == "device":
        return torch.device(content)
    if kind == "torch":
        found = getattr(torch, content, None)
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
    if kind == "op":
        namespace, name, overload = content.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    if kind == "operator" and content in _OPERATORS:
        return getattr(operator, content)
    if kind == "name":
        return _import(content, allow)
    raise FormatError(f"unknown value {kind!r}.")


def _name_of(thing: Any, where: str) -> str:
    name = f"{thing.__module__}:{thing.__qualname__}"
    if "<" in name or thing.__module__ == "builtins":
        raise FormatError(f"{where} is {name}, which has no name to import it by: define it at the top of a module.")
    return name


def _import(name: str, allow: frozenset[str] | None) -> Any:
    module, _, qualified = name.partition(":")
    package = module.partition(".")[0]
    if allow is not None and package not in allow:
        raise FormatError(
            f"the file needs '{name}'. If you trust that package, load the file with "
            f"espalier.load(path, allow=('{package}',))."
        )
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise FormatError(f"the file needs '{name}', which cannot be imported: {error}") from error
    return found
