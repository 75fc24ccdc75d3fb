"""Families of channels, heads and kernels: one index map per parameter, no object per channel."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import nn

from espalier.graph.axes import Axes
from espalier.space.structure import Family, Slices


def axis_families(axes: Axes, model: nn.Module, levels: Collection[str], taken: Collection[str]) -> list[Family]:
    """Components of coupled axes that touch the same parameters in the same way are one family.

    ``levels`` says whether channels, heads or both are wanted, ``taken`` which names are in use.
    """
    places = [(name, dim, axis) for name, labels in axes.parameters.items() for dim, axis in enumerate(labels)]
    places = [(name, dim, axis) for name, dim, axis in places if axis is not None]
    if not places:
        return []
    count = 1 + max(int(axis.max()) for _, _, axis in places)
    weight = np.random.default_rng(0).integers(1, 2**62, size=len(places), dtype=np.uint64)
    signature = np.zeros(count, dtype=np.uint64)  # of what a component touches, and how often
    for k, (_, _, axis) in enumerate(places):
        np.add.at(signature, axis, weight[k])
    zeroed = np.zeros(count, dtype=bool)
    for name, dim, axis in places:
        if (name, dim) in axes.zeroed:
            zeroed[axis] = True
    free = zeroed & (signature > 0)
    free[[c for c in axes.reasons if c < count]] = False
    heads = np.zeros(count, dtype=bool)
    heads[[c for c in axes.heads if c < count]] = True
    families: list[Family] = []
    used = set(taken)
    order = np.flatnonzero(free)
    _, first, group = np.unique(signature[order], return_index=True, return_inverse=True)
    for g in np.argsort(first):
        members = order[group == g]
        level = "head" if heads[members].any() else "channel"
        if level in levels:
            families.append(_family(axes, places, members, level, used))
    return families


def _family(
    axes: Axes, places: Sequence[tuple[str, int, np.ndarray]], members: np.ndarray, level: str, used: set[str]
) -> Family:
    position = np.full(int(members.max()) + 1, -1)
    position[members] = np.arange(len(members))
    slices: list[Slices] = []
    readers: list[Slices] = []
    for name, dim, axis in places:
        inside = axis <= members.max()
        owner = np.where(inside, position[np.minimum(axis, members.max())], -1)
        if (owner >= 0).any():
            made = Slices(name, dim, torch.from_numpy(owner))
            (slices if (name, dim) in axes.zeroed else readers).append(made)
    widest = [s for s in slices if not s.parameter.endswith("bias")] or slices
    name = widest[0].parameter.removesuffix(".weight")
    if level == "head":
        name += ".heads"
    unique, i = name, 1
    while unique in used:
        unique, i = f"{name}@{i}", i + 1
    used.add(unique)
    return Family(level, unique, len(members), tuple(slices), tuple(readers), components=members)


def kernel_families(model: nn.Module, protected: Collection[str], taken: Collection[str]) -> list[Family]:
    """Every kernel (the k × k slice of one output and one input channel) of every convolution with k > 1."""
    families = []
    names = {id(p): name for name, p in model.named_parameters()}
    for path, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.modules.conv._ConvNd) or not isinstance(weight, nn.Parameter):
            continue
        name, grid = names[id(weight)], tuple(weight.shape[:2])
        if all(k == 1 for k in layer.kernel_size) or name in protected:
            continue
        owner = torch.arange(grid[0] * grid[1]).reshape(grid)
        title = f"{path or 'model'}.kernels"
        families.append(Family("kernel", title, owner.numel(), (Slices(name, 0, owner),), grid=grid))
    return [f for f in families if f.name not in taken]


def kept_axes(axes: Axes) -> dict[tuple[str, int], str]:
    """Why axes of parameters stay whole: (parameter, axis) → reason; the axes of windows aside."""
    found: dict[tuple[str, int], str] = {}
    for name, labels in axes.parameters.items():
        for dim, axis in enumerate(labels):
            if axis is None:
                continue
            reasons = [axes.reasons[c] for c in np.unique(axis).tolist() if c in axes.reasons]
            if reasons and "moves a window" not in reasons[0]:
                found[name, dim] = reasons[0]
    return found
