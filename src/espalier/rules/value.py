"""What a tensor of the full network has become in the sub-network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, fx, nn

from espalier.graph.constants import Constant, shape_of, shrink

Kept: TypeAlias = dict[int, Tensor]
ZERO = Constant(torch.zeros(()), torch.zeros(()))


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A tensor of which only a box is still computed, by ``node``: the indices ``kept[d]`` (sorted) of each axis d.

    Elsewhere it is constant: ``background`` broadcasts to ``shape`` (that of the full tensor, the example's batch
    included) and holds its values in eval and in train mode; within the box it means nothing (zero, where it has
    the room to say so).
    """

    node: fx.Node
    kept: Kept
    shape: tuple[int, ...]
    background: Constant

    def __post_init__(self) -> None:
        outside = self.background if self.background.is_zero else both(self.background, self._without_box)
        object.__setattr__(self, "background", ZERO if outside.is_zero else outside)

    def _without_box(self, tensor: Tensor) -> Tensor:
        at = {d - (len(self.shape) - tensor.ndim): index.to(tensor.device) for d, index in self.kept.items()}
        if any(d < 0 or tensor.shape[d] == 1 for d in at):
            return tensor
        box = torch.ones((), dtype=torch.bool, device=tensor.device)
        for d, index in at.items():
            shape = [1] * tensor.ndim
            shape[d] = -1
            mask = torch.zeros(tensor.shape[d], dtype=torch.bool, device=tensor.device)
            mask[index] = True
            box = box & mask.view(shape)
        return tensor.masked_fill(box, 0)

    def gone(self, dim: int) -> Tensor:
        """The indices of the axis that are no longer computed, ascending."""
        mask = torch.ones(self.shape[dim], dtype=torch.bool)
        if dim in self.kept:
            mask[self.kept[dim]] = False
        else:
            mask[:] = False
        return mask.nonzero().flatten()

    def same_box(self, other: "Narrowed") -> bool:
        return self.kept.keys() == other.kept.keys() and all(
            torch.equal(self.kept[d], other.kept[d]) for d in self.kept
        )

    def with_node(self, node: fx.Node, background: Constant | None = None) -> "Narrowed":
        return Narrowed(node, self.kept, self.shape, self.background if background is None else background)


Value: TypeAlias = fx.Node | Constant | Narrowed


class Build(Protocol):
    """What rules may ask of the construction (:mod:`espalier.space.reduce`)."""

    def kept(self, node: fx.Node) -> Kept:
        """What the solution leaves of the axes of the node's result, where that is not all (channels, heads)."""
        ...

    def kept_of(self, node: fx.Node, name: str) -> Kept:
        """The same for a parameter of the layer that the node calls."""
        ...

    def select(self, source: fx.Node, kept: Kept) -> fx.Node:
        """The tensor at these indices."""
        ...

    def training(self) -> fx.Node:
        """A node that yields whether the network is in train mode."""
        ...

    def added_layer(self, path: str, layer: nn.Module, source: fx.Node, val: Any) -> fx.Node:
        """A call of a layer that the full network does not have."""
        ...

    def copy(self, node: fx.Node, inputs: Sequence[fx.Node]) -> fx.Node:
        """The node of the sub-network that does to ``inputs`` what ``node`` does to its tensors."""
        ...

    def call(self, target: Callable[..., Any], *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        """A new node; ``val`` stands for its full-size value, by default that of the node at hand."""
        ...

    def module(self, node: fx.Node) -> Any:
        """The layer that the node calls, its removed slices at zero."""
        ...

    def slice(self, node: fx.Node, name: str, kept: Kept) -> nn.Parameter:
        """What stays of a parameter of the node's layer; the same object wherever the parameter is shared."""
        ...

    def install(self, node: fx.Node, layer: nn.Module, *sources: fx.Node) -> fx.Node:
        """A call of ``layer`` in the place of the node's own."""
        ...

    def shared(self, node: fx.Node) -> bool:
        """Whether the node's layer, or a parameter of it, serves elsewhere too."""
        ...

    def widen(self, value: Narrowed, dim: int, kept: Tensor | None = None) -> "fx.Node | Narrowed":
        """The value with constants put back along ``dim``, up to ``kept`` (by default to the whole axis)."""
        ...

    def put_back(self, value: Narrowed) -> fx.Node:
        """The whole tensor: what is still computed and the constants, in the old order."""
        ...

    def constant(self, value: Constant, name: str) -> fx.Node:
        """A node that yields the constant in the present mode."""
        ...

    def attribute(self, name: str, tensor: Tensor) -> fx.Node:
        """A node that yields a tensor, kept as a buffer."""
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


def both(value: Constant, function: Callable[[Tensor], Tensor]) -> Constant:
    """Apply a function to the constant's value of each mode."""
    return Constant(function(value.evaluated), function(value.trained))


def both2(a: Constant, b: Constant, function: Callable[[Tensor, Tensor], Tensor]) -> Constant:
    """The same for a function of two constants."""
    return Constant(function(a.evaluated, b.evaluated), function(a.trained, b.trained))


def evaluated(value: Constant, function: Callable[[Tensor], Tensor], ndim: int) -> Constant:
    """``function`` of a constant, as small as it can be told; it has ``ndim`` axes (zero stands for any number)."""

    def apply(tensor: Tensor) -> Tensor:
        result = shrink(function(tensor))
        return result.reshape((1,) * (ndim - result.ndim) + tuple(result.shape))

    result = both(value, apply)
    return ZERO if result.is_zero else result


def part(value: Constant, dim: int, index: Tensor, ndim: int) -> Constant:
    """The constant at these indices of an axis of a tensor with ``ndim`` axes."""

    def take(tensor: Tensor) -> Tensor:
        at = dim - (ndim - tensor.ndim)
        return tensor if at < 0 or tensor.shape[at] == 1 else tensor.index_select(at, index.to(tensor.device))

    return both(value, take)


def within(value: Constant, kept: Mapping[int, Tensor], ndim: int) -> Constant:
    """The constant on a box."""
    for dim, index in kept.items():
        value = part(value, dim, index, ndim)
    return value


def full_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of the node's value in the full network, at the example's batch."""
    return tuple(shape_of(node.meta["val"]))


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that the node reads, in order, each as often as it is read."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)
    return found
