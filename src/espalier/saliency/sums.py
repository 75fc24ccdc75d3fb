"""Sums of a number per parameter element over the structures."""

from collections.abc import Mapping

import torch

from espalier.space.search_space import SearchSpace
from espalier.space.structure import Slices


def sums(space: SearchSpace, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Add up ``values`` (one tensor per parameter, of its shape) over each structure's slices [structures]."""
    place = {structure.name: i for i, structure in enumerate(space.structures)}
    some = next(iter(values.values()))
    total = torch.zeros(len(place), dtype=some.dtype, device=some.device)
    for family in space.families:
        at = torch.tensor([place[name] for name in family.names], device=some.device)
        for slices in family.slices:
            if slices.parameter in values:
                total.index_add_(0, *_per_structure(values[slices.parameter], slices, at))
    return total


def _per_structure(value: torch.Tensor, slices: Slices, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(structure, sum) of each slice."""
    if slices.dim is None or slices.owner is None:
        return at, value.sum().expand(len(at))
    owner = slices.owner.to(value.device)
    inside = owner >= 0
    per_index = value.movedim(slices.dim, 0).reshape(len(owner), -1).sum(1)
    return at[owner[inside]], per_index[inside]
