"""Keep masks through training: with any optimizer, exactly, and into what is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from espalier.curvature.layout import Predicate, convolution_and_linear


class Hold:
    """The masks in force; `remove()` ends them. Made by `hold_masks`."""

    def __init__(self, remove: list[Callable[[], None]]) -> None:
        self._remove = remove

    def remove(self) -> None:
        """Let masked weights train again."""
        for undo in self._remove:
            undo()
        self._remove = []


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights that a mask leaves out to exactly zero.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> apply_masks(layer, {"weight": torch.tensor([[True, False]])})
    >>> float(layer.weight[0, 1].detach())
    0.0

    Raises ValueError, and changes nothing, for a name or a shape that the model does not have.
    """
    with torch.no_grad():
        for parameter, gone in zip(*_masked(model, masks), strict=True):
            parameter.masked_fill_(gone, 0)


def zero_masks(model: nn.Module, prunable: Predicate = convolution_and_linear) -> dict[str, Tensor]:
    """The masks that a pruned model carries in its weights: True where they are not zero.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> apply_masks(layer, {"weight": torch.tensor([[True, False]])})
    >>> zero_masks(layer)
    {'weight': tensor([[ True, False]])}

    For a model that was constructed, exported or loaded: what is zero in it can be held at zero by `hold_masks`.
    Only weights that `prunable` accepts and that hold a zero are named.
    """
    masks = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if prunable(name, module, parameter) and bool((parameter == 0).any()):
                masks[name] = parameter.detach() != 0
    return masks


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> Hold:
    """Apply the masks now and at every step of the optimizer, until `remove()` of what is returned.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    >>> hold = hold_masks(layer, {"weight": torch.tensor([[True, False]])}, optimizer)
    >>> layer(torch.ones(1, 2)).sum().backward(); optimizer.step()
    >>> float(layer.weight[0, 1].detach())
    0.0

    Without an optimizer, at every step of any `torch.optim` optimizer, also of one that is made later.

    Momentum and other per-weight state of what is masked is cleared before an optimizer's first step, and gradients of
    masked weights are set to zero before each step (also where they are not finite): a weight that returns in a later
    pruning starts afresh. Raises ValueError for a name or a shape that the model does not have, and for an optimizer
    that has none of the masked parameters.
    """
    parameters, gone = _masked(model, masks)
    if optimizer is not None and parameters:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for p in parameters):
            raise ValueError(
                f"the optimizer trains none of the masked parameters ({next(iter(masks))} ...): make it from the "
                "parameters of the model that the masks are for, not of the one before it was pruned"
            )
    apply_masks(model, masks)
    met: WeakSet[torch.optim.Optimizer] = WeakSet()
    pairs = list(zip(parameters, gone, strict=True))

    def before(stepping: torch.optim.Optimizer, *_: Any) -> None:
        if stepping not in met:
            met.add(stepping)
            clear_state(model, masks, stepping)
        for parameter, mask in pairs:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(mask, 0)

    def after(*_: Any) -> None:
        with torch.no_grad():
            for parameter, mask in pairs:
                parameter.masked_fill_(mask, 0)

    if not parameters:
        return Hold([])
    if optimizer is None:
        handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    else:
        clear_state(model, masks, optimizer)
        handles = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
    return Hold([handle.remove for handle in handles])


def clear_state(model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Zero the optimizer's per-weight state (momentum, second moments) of masked weights."""
    for parameter, gone in zip(*_masked(model, masks), strict=True):
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == gone.shape:
                value.masked_fill_(gone.to(value.device), 0)


def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The parameters that the masks name, and what of each is masked, on its device."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"the masks name {name}, which the model does not have")
        if parameters[name].shape != mask.shape:
            raise ValueError(f"{name} is {tuple(parameters[name].shape)}, its mask {tuple(mask.shape)}")
    chosen = [parameters[name] for name in masks]
    return chosen, [~mask.to(p.device, torch.bool) for p, mask in zip(chosen, masks.values(), strict=True)]
