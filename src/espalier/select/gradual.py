"""Gradual pruning: pruning steps with fine-tuning on the support in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.modes import evaluating
from espalier.select.masking import Hold, hold_masks

Select = Callable[[nn.Module, float, int], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""From (model, fraction to keep, number of the pruning step) to keep masks and new weights, by name."""


@dataclass(frozen=True)
class GradualOptions:
    """When and how far: `events` prunings, one every `every` epochs from epoch `begin` on.

    first, last: sparsity after the first and the last of them, cubic in between (polynomial GMP).
    """

    first: float = 0.5
    last: float = 0.9
    events: int = 7
    every: int = 12
    begin: int = 0

    def sparsity(self, event: int) -> float:
        """Sparsity after pruning number `event`, from 0.

        >>> [round(GradualOptions(events=3).sparsity(i), 3) for i in range(3)]
        [0.5, 0.85, 0.9]
        """
        left = 0.0 if self.events == 1 else 1 - event / (self.events - 1)
        return self.last + (self.first - self.last) * left**3

    def event(self, epoch: int) -> int | None:
        """The number of the pruning due before this epoch, or None."""
        number, rest = divmod(epoch - self.begin, self.every)
        return number if rest == 0 and 0 <= number < self.events else None


class GradualPruner:
    """Prunes a model while it is trained; call `before_epoch` at the start of every epoch.

    >>> from espalier.select.magnitude import magnitude
    >>> model = nn.Linear(4, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    >>> def select(model, keep, event):
    ...     result = magnitude(model.weight.detach().flatten(), int(keep * 4))
    ...     return {"weight": result.support.view(1, 4)}, {"weight": result.weights.view(1, 4)}
    >>> pruner = GradualPruner(model, optimizer, select, GradualOptions(last=0.5, events=1))
    >>> pruner.before_epoch(0), int((model.weight == 0).sum())
    (0.5, 2)

    Works with any optimizer and schedule; `state_dict` and `load_state_dict` make a stopped run go on bit by
    bit as if it had not been stopped. Nothing is changed where `select` raises.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, select: Select, options: GradualOptions
    ) -> None:
        self.model, self.optimizer, self.select, self.options = model, optimizer, select, options
        self.masks: dict[str, Tensor] = {}
        self._handle: Hold | None = None

    def before_epoch(self, epoch: int) -> float | None:
        """Prune if this epoch begins with a pruning; the sparsity aimed at, or None."""
        event = self.options.event(epoch)
        if event is None:
            return None
        sparsity = self.options.sparsity(event)
        with evaluating(self.model):
            masks, weights = self.select(self.model, 1 - sparsity, event)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        self._hold(masks)
        return sparsity

    def _hold(self, masks: Mapping[str, Tensor]) -> None:
        if self._handle is not None:
            self._handle.remove()
        self.masks = {name: mask.clone() for name, mask in masks.items()}
        self._handle = hold_masks(self.model, self.masks, self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The masks in force."""
        return {"masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the masks again; load the model and the optimizer first."""
        if state["masks"]:
            self._hold(state["masks"])
