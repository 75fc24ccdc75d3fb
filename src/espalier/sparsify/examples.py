"""Gates of each example's own: the example alone may depend on them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from espalier.errors import TrainingError
from espalier.sparsify.claims import agree
from espalier.sparsify.passes import frozen_statistics, same_noise


def refuse_batch_norms(model: nn.Module) -> None:
    """Raises :class:`TrainingError` where a batch norm averages over the batch, in the mode that it has now."""
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None):
            raise TrainingError(
                f"'{name}' averages over the batch, but per_sample=True draws gates for each example and credits them "
                "with its own loss alone: take per_sample=False, or put the model into eval mode."
            )


@torch.no_grad()
def try_examples(model: nn.Module, z: Tensor, run: Callable[[Tensor], Any]) -> None:
    """See that the first example's outputs stay as they are when all other examples' gates become others.

    ``z`` are gates [B, V]; ``run`` evaluates the network under such, twice in all. Only outputs with B in front can
    tell. Raises :class:`TrainingError` for those that change.
    """
    other = 1.0 - z
    other[0] = z[0]
    made = []
    for gates in (z, other):
        with same_noise(model), frozen_statistics(model):
            found = [t for t in pytree.tree_leaves(run(gates)) if isinstance(t, Tensor) and t.is_floating_point()]
        made.append([t[:1] for t in found if t.ndim and len(t) == len(z)])
    if not agree(*made):
        raise TrainingError(
            f"per_sample=True: in {type(model).__name__} the first example's output changes with other examples' "
            "gates. Dimension 0 of what reaches every gated layer must be the batch, and nothing may mix examples (a "
            "batch norm in training mode does): lay the batch first, or take per_sample=False."
        )
