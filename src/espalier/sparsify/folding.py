"""Gates multiplied into parameters: kept ones fold in, closed units go to zero."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from espalier.sparsify.conditional import Narrowing
from espalier.sparsify.sites import Site


def along(dim: int | None, weight: Tensor) -> list[int]:
    """The shape of one number per index of ``dim`` that broadcasts against the weight."""
    return [-1 if d == dim else 1 for d in range(weight.ndim)]


def masks(narrowing: Narrowing, own: Mapping[str, Tensor], is_open: Tensor) -> dict[str, Tensor]:
    """Boolean masks of the parameters that closed units leave, by parameter name, for gates [V] of bool."""
    found: dict[str, Tensor] = {}
    for (name, dim), which in narrowing.index.items():
        mask = found.setdefault(name, torch.ones_like(own[name], dtype=torch.bool))
        for gates in which:
            mask &= is_open[gates].view(along(dim, mask))
    return found


@torch.no_grad()
def folded(sites: Sequence[Site], narrowing: Narrowing, own: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
    """The parameters, by name, that have gates of these values [V] folded in (Eqs. 13 and 14)."""
    found: dict[str, Tensor] = {}
    for site, gate in zip(sites, value.split([s.count for s in sites]), strict=True):
        for part in site.scaled:
            weight = found.get(part.parameter, own[part.parameter])
            factor = gate if part.owner is None else gate[part.owner]
            found[part.parameter] = weight * factor.to(weight.dtype).view(along(part.dim, weight))
    for name, mask in masks(narrowing, own, value > 0).items():
        found[name] = found.get(name, own[name]) * mask
    return found
