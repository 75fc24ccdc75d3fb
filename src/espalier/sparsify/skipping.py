"""Conditional computation for segments: one whose gate is 0 is not computed, its constant takes its place."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from espalier.graph.constants import hint
from espalier.space.search_space import SearchSpace


class Skipping:
    """Runs the traced network without some of its segments.

    >>> from espalier import search_space
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.a(x) + self.b(x))
    >>> net, x = Net(), torch.randn(3, 4)
    >>> run = Skipping(search_space(net, x))
    >>> torch.allclose(run(["b"], {}, (x,), {}), net.out(net.a(x)))
    True

    ``run(closed, parameters, args, kwargs)``: ``closed`` are names of structures, ``parameters`` take the place of the
    network's own, by name.
    """

    def __init__(self, space: SearchSpace):
        self.space = space
        self._network = _Network(space.trace.graph_module)
        self._nodes: dict[str, dict[fx.Node, Any]] = {}  # structure → its nodes; the last one with its constant
        for family in space.families:
            ends = [space.graph[i].nodes[-1] for i in family.segments]
            if family.segments and all(_batch_only(n) for n in ends):
                nodes: dict[fx.Node, Any] = {n: None for i in family.segments for n in space.graph[i].nodes}
                nodes |= {end: space.constant(i) for end, i in zip(ends, family.segments, strict=True)}
                self._nodes[family.name] = nodes

    def __call__(self, closed: Collection[str], parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        skipped = {node: value for name in closed for node, value in self._nodes.get(name, {}).items()}
        self._network.training = self.space.model.training
        named = {f"network.{name}": tensor for name, tensor in parameters.items()}
        return functional_call(self._network, named, (skipped, pytree.tree_leaves((args, kwargs))))


class _Network(nn.Module):
    def __init__(self, network: fx.GraphModule):
        super().__init__()
        self.network = network

    def forward(self, skipped: Mapping[fx.Node, Any], leaves: list[Any]) -> Any:
        self.network.training = self.training
        out = _Walk(self.network, skipped, leaves).run(*leaves, enable_io_processing=False)
        return self.network.graph.process_outputs(out)


class _Walk(fx.Interpreter):
    def __init__(self, network: fx.GraphModule, skipped: Mapping[fx.Node, Any], leaves: list[Any]):
        super().__init__(network)
        first = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim)
        self.skipped, self.like, self.mode = skipped, first, network.training

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.skipped:
            return super().run_node(n)
        constant = self.skipped[n]
        if constant is None:
            return None
        value = constant.trained if self.mode else constant.evaluated
        full = n.meta["val"]
        shape = [len(self.like) if isinstance(s, torch.SymInt) else int(s) for s in full.shape]
        return value.to(self.like.device).expand(shape)


def _batch_only(node: fx.Node) -> bool:
    """Whether the value has one free dimension at most, the batch in front."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or any(isinstance(s, torch.SymInt) for s in value.shape[1:]):
        return False
    first = next((n for n in node.graph.nodes if n.op == "placeholder"), None)
    given = first.meta["val"] if first is not None else None
    if not isinstance(given, Tensor) or not value.ndim or not given.ndim:
        return False
    return not isinstance(value.shape[0], torch.SymInt) or hint(value.shape[0]) == hint(given.shape[0])
