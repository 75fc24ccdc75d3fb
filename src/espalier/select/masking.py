"""Keep masks through training: with any optimizer, exactly, and into what is saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights that a mask leaves out to exactly zero.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> apply_masks(layer, {"weight": torch.tensor([[True, False]])})
    >>> float(layer.weight[0, 1].detach())
    0.0
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"the masks name {name}, which the model does not have")
        if parameters[name].shape != mask.shape:
            raise ValueError(f"{name} is {tuple(parameters[name].shape)}, its mask {tuple(mask.shape)}")
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Apply the masks now and after every step of the optimizer, until the handle is removed.

    Momentum and other per-weight state of what is masked is cleared now, so that a weight that returns in a
    later pruning step starts afresh.
    """
    masks = dict(masks)
    apply_masks(model, masks)
    clear_state(model, masks, optimizer)
    return optimizer.register_step_post_hook(lambda *_: apply_masks(model, masks))


def clear_state(model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Zero the optimizer's per-weight state (momentum, second moments) of masked weights."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        for value in optimizer.state.get(parameters[name], {}).values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                value.masked_fill_(~mask.to(value.device), 0)
