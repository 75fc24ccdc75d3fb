"""The scales of a structure's norms."""

import torch
from torch import nn

from espalier.saliency.state import State, average
from espalier.saliency.sums import sums
from espalier.space.search_space import SearchSpace

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@average
def bn_scale(space: SearchSpace, state: State) -> torch.Tensor:
    """The mean ``|gamma|`` over the scales of a structure's norms (Liu et al., "Network slimming", 2017).

    Batch, instance, layer, group and RMS norms count. Where only slices of a norm belong to a structure, these
    slices count. A structure without a norm has 1, the scale that changes nothing.
    """
    own = {id(m.weight) for m in space.model.modules() if isinstance(m, _NORMS) and m.weight is not None}
    scales = {name: p.detach().abs() for name, p in space.model.named_parameters() if id(p) in own}
    if not scales:
        return torch.ones_like(state.weight_sq)
    total = sums(space, {name: scale.to(state.weight_sq) for name, scale in scales.items()})
    count = sums(space, {name: torch.ones_like(scale).to(total) for name, scale in scales.items()})
    return torch.where(count > 0, total / count.clamp_min(1.0), 1.0)
