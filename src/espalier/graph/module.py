"""Modules: graph modules that may read ``self.training``, and shallow copies."""

from typing import Any

import torch
from torch import fx, nn


class ModalGraphModule(fx.GraphModule):
    """A graph module whose code reads ``self.training``.

    ``fx`` pickles a graph module's code and traces it again, which would fix the flag: this one is pickled by its
    nodes.
    """

    def __reduce__(self) -> Any:
        from espalier.architecture import to_json

        tensors: dict[str, torch.Tensor] = {}
        return _rebuilt, (to_json(self, tensors), {name: t.detach() for name, t in tensors.items()})


def shallow(module: nn.Module) -> Any:
    """Another module of the same class with the same settings, over the same tensors and children.

    Assigning to either leaves the other alone. (``copy.copy`` goes through pickling, which some modules refuse.)
    """
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    return twin


def graph_module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module that runs ``graph`` over the layers of ``root``; a plain ``fx.GraphModule`` wherever possible."""
    modal = any(node.op == "get_attr" and node.target == "training" for node in graph.nodes)
    return (ModalGraphModule if modal else fx.GraphModule)(root, graph, name)


def _rebuilt(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    from espalier.architecture import build

    return build(described, tensors)
