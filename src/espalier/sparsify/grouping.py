"""Groups of single elements: whole tensors, filters, neurons, kernels, weights, segments, or segments tied by
a key.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.space.search_space import SearchSpace


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which group every element of a model's parameters belongs to.

    ``names`` are the groups' names. ``owner`` maps a parameter's name to int64, broadcastable to its shape:
    the group of every element, -1 for none; parameters that are not in it belong to no group. ``members``
    [groups] are the structures of ``space`` behind each group, where it comes from one.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3, bias=False))
    >>> groups = layer_groups(model, ["0", "1"], level="filter")
    >>> len(groups.names), groups.size.tolist()
    (6, [28.0, 28.0, 28.0, 28.0, 36.0, 36.0])
    """

    model: nn.Module
    names: tuple[str, ...]
    owner: Mapping[str, Tensor]
    space: SearchSpace | None = None
    members: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise SpaceError("there is no group at all: nothing could be driven to zero.")
        own = dict(self.model.named_parameters())
        for name, owner in self.owner.items():
            if name not in own:
                raise SpaceError(f"'{name}' is no parameter of the model (a shared one has its first name only).")
            if bool((owner >= len(self.names)).any()):
                raise SpaceError(f"'{name}': a group's number lies in 0 … {len(self.names) - 1}, or is -1.")
            torch.broadcast_shapes(owner.shape, own[name].shape)
        empty = (self.size == 0).nonzero().flatten().tolist()
        if empty:
            raise SpaceError(f"group '{self.names[empty[0]]}' has no parameters: leave it out.")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def size(self) -> Tensor:
        """Number of elements of every group, float64 [groups]."""
        total = torch.zeros(len(self.names) + 1, dtype=torch.float64)
        own = dict(self.model.named_parameters())
        for name, owner in self.owner.items():
            each = own[name].numel() / max(owner.numel(), 1)
            flat = owner.flatten().cpu()
            total.index_add_(0, torch.where(flat < 0, len(self.names), flat), torch.full(flat.shape, each).double())
        return total[:-1]


def named_groups(model: nn.Module, groups: Mapping[str, Sequence[str]]) -> Grouping:
    """Groups of whole parameters, by name.

    Raises :class:`SpaceError` for a group without parameters and for a parameter in two groups.
    """
    owner: dict[str, Tensor] = {}
    for i, (group, parameters) in enumerate(groups.items()):
        if not parameters:
            raise SpaceError(f"group '{group}' has no parameters: leave it out.")
        for name in parameters:
            if name in owner:
                first = list(groups)[int(owner[name])]
                if first == group:
                    raise SpaceError(f"parameter '{name}' is named twice in group '{group}'.")
                raise SpaceError(
                    f"parameter '{name}' is in two groups, '{first}' and '{group}': groups do not overlap."
                )
            owner[name] = torch.tensor(i)
    return Grouping(model, tuple(groups), owner)


def space_groups(space: SearchSpace, key: Callable[[str], str] | None = None) -> Grouping:
    """One group per structure of a search space (kernel, channel, head, segment), over all its slices.

    >>> from espalier.space.search_space import search_space
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> space = search_space(net, torch.randn(2, 3, 8, 8), levels=("channel",))
    >>> groups = space_groups(space)
    >>> groups.names, groups.size.tolist()  # 27 weights, a bias, and the norm's scale and shift
    (('0[0]', '0[1]', '0[2]', '0[3]'), [30.0, 30.0, 30.0, 30.0])

    Structures with the same ``key(name)`` are tied into one; GS-NAS ties the same operation of all cells of one type.
    Raises :class:`SpaceError` where an element would be in two groups (a channel of a segment, a kernel of a
    channel): proximal steps need groups that do not overlap, so make one space per level.
    """
    space.check_not_empty()
    tied: dict[str, list[str]] = {}
    group_of = torch.empty(len(space), dtype=torch.long)
    place: dict[str, int] = {}
    for i, name in enumerate(space.structures.names):
        title = key(name) if key else name
        tied.setdefault(title, []).append(name)
        group_of[i] = place.setdefault(title, len(place))
    shapes = {name: p.shape for name, p in space.model.named_parameters()}
    names, owner = tuple(tied), {}
    for family, start in zip(space.families, space.structures.offsets, strict=False):
        for s in family.slices:
            at = torch.zeros((), dtype=torch.long) if s.owner is None else s.owner
            dim, ndim = s.dim or 0, len(shapes[s.parameter])
            shape = [1] * dim + list(at.shape) + [1] * (ndim - dim - at.ndim)
            mine = torch.where(at < 0, -1, group_of[at.clamp_min(0) + int(start)]).view(shape)
            there = owner.get(s.parameter)
            owner[s.parameter] = mine if there is None else _merged(there, mine, s.parameter, names)
    return Grouping(space.model, names, owner, space, tuple(tuple(m) for m in tied.values()))


def _merged(a: Tensor, b: Tensor, parameter: str, names: Sequence[str]) -> Tensor:
    """The owner of every element, from two that leave each other alone."""
    clash = (a >= 0) & (b >= 0) & (a != b)
    if bool(clash.any()):
        first, second = (names[int(t.broadcast_to(clash.shape)[clash][0])] for t in (a, b))
        raise SpaceError(
            f"parameter '{parameter}' is in two groups, '{first}' and '{second}': groups do not overlap; "
            "make a search space of one level."
        )
    return torch.where(a >= 0, a, b)


def layer_groups(model: nn.Module, layers: Sequence[str] | None = None, level: str = "filter") -> Grouping:
    """Groups within single layers, by their dotted paths (default: all convolutions and linear layers).

    ``level``: "filter" (also for neurons: a row of the weight, with its bias), "input" (a column of the
    weight), "kernel" (one of a convolution's k×k slices), "tensor" (the weight), "weight" (each element).
    """
    if layers is None:
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    twice = [layer for i, layer in enumerate(layers) if layer in layers[:i]]
    if twice:
        raise SpaceError(f"layer '{twice[0]}' is named twice.")
    modules = dict(model.named_modules())
    names: list[str] = []
    owner: dict[str, Tensor] = {}
    for layer in layers:
        if not isinstance(getattr(modules.get(layer), "weight", None), Tensor):
            raise SpaceError(f"'{layer}' is no layer with a weight.")
        weight = modules[layer].weight
        assert isinstance(weight, Tensor)
        shape = _owner_shape(weight, level, layer)
        count = torch.Size(shape).numel()
        ids = torch.arange(count) + len(names)
        owner[f"{layer}.weight"] = ids.view(shape)
        bias = getattr(modules[layer], "bias", None)
        if level == "filter" and bias is not None:
            owner[f"{layer}.bias"] = ids
        names += [f"{layer}[{i}]" for i in range(count)]
    return Grouping(model, tuple(names), owner)


def _owner_shape(weight: Tensor, level: str, layer: str) -> list[int]:
    rest = [1] * (weight.ndim - 2)
    shapes = {
        "filter": [len(weight), *[1] * (weight.ndim - 1)],
        "input": [1, weight.shape[1], *rest] if weight.ndim > 1 else None,
        "kernel": [*weight.shape[:2], *rest] if weight.ndim > 2 else None,
        "tensor": [1] * weight.ndim,
        "weight": list(weight.shape),
    }
    if level not in shapes:
        raise SpaceError(f"unknown level '{level}': there are {', '.join(shapes)}.")
    shape = shapes[level]
    if shape is None:
        raise SpaceError(f"the weight of '{layer}' has {weight.ndim} dimensions and no level '{level}'.")
    return shape
