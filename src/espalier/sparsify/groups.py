"""Sums over each structure's parameters, without a loop over structures."""

from collections.abc import Sequence

import torch
from torch import nn

from espalier.errors import SpaceError
from espalier.saliency.state import State
from espalier.space.search_space import SearchSpace
from espalier.sparsify import foreach
from espalier.sparsify.foreach import norms


class Groups:
    """The parameters of a search space's structures: one list of tensors, each with the group it belongs to.

    ``tensors`` are the parameters and ``names`` their names; ``group`` [tensors] is the structure of each and
    ``size`` [structures] the number of elements.
    """

    def __init__(self, space: SearchSpace):
        if not len(space):
            reasons = "; ".join(f"'{name}': {reason}" for name, reason in list(space.kept.items())[:5])
            raise SpaceError(f"the search space is empty: no structure of the model may go ({reasons} ...).")
        parameters = dict(space.model.named_parameters())
        pairs = [(name, i) for i, s in enumerate(space.structures) for name in s.parameters]
        self.names = [name for name, _ in pairs]
        self.tensors: list[nn.Parameter] = [parameters[name] for name in self.names]
        device = self.tensors[0].device
        self.count = len(space)
        self.group = torch.tensor([i for _, i in pairs], device=device)
        sizes = torch.tensor([float(t.numel()) for t in self.tensors], device=device)
        self.size = self.sum(sizes)

    def sum(self, per_tensor: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Add up one number per tensor to one per structure; ``rows`` says which tensors they are."""
        group = self.group if rows is None else self.group[rows]
        total = torch.zeros(self.count, dtype=per_tensor.dtype, device=per_tensor.device)
        return total.index_add_(0, group, per_tensor)

    def state(self, gradients: Sequence[torch.Tensor]) -> State:
        """What saliencies look at, for these gradients (one per tensor)."""
        weights = [t.detach() for t in self.tensors]
        weight_norm, grad_norm = norms(weights), norms(gradients)
        # <x, g> from |x + s g|² = 2 |x|² + 2 s <x, g>, where s = |x| / |g| keeps both terms of one size.
        scale = torch.where((weight_norm > 0) & (grad_norm > 0), weight_norm / grad_norm.clamp_min(1e-38), 1.0)
        summed = foreach.mul(gradients, scale.to(weights[0].dtype).unbind())
        foreach.add_(summed, weights)
        dot = (norms(summed).square() - weight_norm.square() - (scale * grad_norm).square()) / (2 * scale)
        return State(
            weight_sq=self.sum(weight_norm.square()),
            grad_sq=self.sum(grad_norm.square()),
            dot=self.sum(dot),
            size=self.size,
            parameters=dict(zip(self.names, weights, strict=True)),
            gradients=dict(zip(self.names, gradients, strict=True)),
        )


def all_finite(tensors: Sequence[torch.Tensor], small: int = 16384) -> torch.Tensor:
    """Whether no element is NaN or infinite, as a tensor on their device.

    Large tensors are read once where they lie; small ones, where the calls cost more than the reading, are
    joined first.
    """
    few = [t for t in tensors if t.numel() < small]
    many = [t for t in tensors if t.numel() >= small]
    parts = []
    if few:
        joined = foreach.flattened(few)
        parts.append(torch.linalg.vector_norm(joined if joined.dtype.itemsize >= 4 else joined.float()).float())
    if many:
        parts.append(norms(many).sum().float())
    return torch.stack(parts).isfinite().all()
