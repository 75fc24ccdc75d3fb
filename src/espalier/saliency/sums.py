"""Sums of a number per parameter element over the structures."""

from collections.abc import Mapping

import torch

from espalier.space.search_space import SearchSpace
from espalier.space.structure import Slices


def sums(space: SearchSpace, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Add up ``values`` (one tensor per parameter, of its shape) over each structure's slices [structures]."""
    some = next(iter(values.values()))
    total = torch.zeros(len(space), dtype=some.dtype, device=some.device)
    for family, start in zip(space.families, space.structures.offsets.tolist(), strict=False):
        for slices in family.slices:
            if slices.parameter in values:
                owner, each = _per_slice(values[slices.parameter], slices)
                total.index_add_(0, owner + start, each)
    return total


def _per_slice(value: torch.Tensor, slices: Slices) -> tuple[torch.Tensor, torch.Tensor]:
    """(position in the family, sum) of each slice that belongs to one."""
    if slices.dim is None or slices.owner is None:
        return torch.zeros(1, dtype=torch.long, device=value.device), value.sum().reshape(1)
    owner = slices.owner.to(value.device)
    inside = owner >= 0
    others = [d for d in range(value.ndim) if not slices.dim <= d < slices.dim + owner.ndim]
    per_slice = value.sum(others) if others else value
    return owner[inside], per_slice[inside]
