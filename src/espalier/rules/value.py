"""What a tensor of the full network has become in the sub-network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import fx, nn

from espalier.graph.constants import Constant


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A tensor of which only the indices ``kept`` (sorted) of axis ``dim`` are still computed, by ``node``.

    The others are constants, uniform along all other axes: ``fill`` holds their values [total - len(kept)], in
    ascending order of index, in eval and in train mode.
    """

    node: fx.Node
    dim: int
    kept: torch.Tensor
    total: int
    fill: Constant

    @property
    def gone(self) -> torch.Tensor:
        """The indices that are no longer computed, ascending."""
        mask = torch.ones(self.total, dtype=torch.bool)
        mask[self.kept] = False
        return mask.nonzero().flatten()

    def same_axis(self, other: "Narrowed") -> bool:
        return self.dim == other.dim and self.total == other.total and torch.equal(self.kept, other.kept)


Value: TypeAlias = fx.Node | Constant | Narrowed


class Build(Protocol):
    """What rules may ask of the construction (:mod:`espalier.construct`)."""

    def copy(self, node: fx.Node, inputs: Sequence[fx.Node]) -> fx.Node:
        """The node of the sub-network that does to ``inputs`` what ``node`` does to its tensors."""
        ...

    def call(self, target: Callable[..., Any], *args: Any, val: Any = None) -> fx.Node:
        """A new node; ``val`` stands for its full-size value, by default that of the node at hand."""
        ...

    def module(self, node: fx.Node) -> nn.Module:
        """The layer that the node calls."""
        ...

    def narrow_module(self, node: fx.Node, module: nn.Module, source: fx.Node) -> fx.Node | None:
        """A call of ``module`` in the place of the node's layer; None if that layer serves elsewhere too."""
        ...

    def constant(self, value: Constant, name: str) -> fx.Node:
        """A node that yields the constant in the present mode."""
        ...


Rule: TypeAlias = Callable[[Build, fx.Node, list[Value]], Value | None]

RULES: dict[object, Rule] = {}


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators and module types."""

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def both(value: Constant, function: Callable[[torch.Tensor], torch.Tensor]) -> Constant:
    """Apply a function to the constant's value of each mode."""
    return Constant(function(value.evaluated), function(value.trained))


def both2(a: Constant, b: Constant, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Constant:
    """The same for a function of two constants."""
    return Constant(function(a.evaluated, b.evaluated), function(a.trained, b.trained))


def along(value: Constant, dim: int, size: int, ndim: int) -> Constant | None:
    """The constant as a vector along ``dim``, None if it is not uniform along the other axes."""

    def vector(tensor: torch.Tensor) -> torch.Tensor:
        at = dim - (ndim - tensor.ndim)
        return tensor.flatten().expand(size) if tensor.numel() == 1 or at >= 0 else tensor

    for tensor in (value.evaluated, value.trained):
        if any(s != 1 for i, s in enumerate(tensor.shape) if i + ndim - tensor.ndim != dim):
            return None
    return both(value, vector)


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The tensors that the node reads, in order, each as often as it is read."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)
    return found
