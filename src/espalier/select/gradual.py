"""Gradual pruning: pruning steps with fine-tuning on the support in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from espalier.curvature.layout import Predicate, WeightLayout, convolution_and_linear
from espalier.curvature.per_layer import Loss
from espalier.modes import evaluating
from espalier.select.masking import Hold, hold_masks
from espalier.select.multistage import Data, StageOptions
from espalier.select.weights import WEIGHT_METHODS, Layers, method_options, quotas

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

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last < 1:
            raise ValueError(f"{self}: sparsities lie in [0, 1), and first is at most last")
        if self.events < 1 or self.every < 1 or self.begin < 0:
            raise ValueError(f"{self}: events and every are at least 1, begin at least 0")

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


def weight_selector(
    data: Data | None = None,
    loss: Loss = nn.functional.cross_entropy,
    method: str = "exchange",
    *,
    layers: Layers = "together",
    pattern: tuple[int, int] | None = None,
    options: StageOptions | Mapping[str, Any] | None = None,
    prunable: Predicate = convolution_and_linear,
) -> Select:
    """A `select` for `GradualPruner`: one of the weight methods, with fresh samples at every pruning.

    >>> data = torch.randn(200, 4), torch.randint(2, (200,))
    >>> select = weight_selector(data, method="chita", options={"n": 40, "batch": 4})
    >>> masks, weights = select(nn.Linear(4, 2).eval(), 0.5, 0)
    >>> int(masks["weight"].sum())
    4

    The arguments are those of `prune_weights`, which says what they mean and what it refuses. Batch norm statistics are
    left to the training that follows. Data is a pair of tensors, or a loader that shuffles.
    """
    chosen = replace(method_options(method, options, data, layers, pattern), recalibrate=0)
    if chosen.free:
        raise ValueError("free=True changes more than the weights that a selector gives: leave it to the training")

    def select(model: nn.Module, keep: float, event: int) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        layout, now = WeightLayout.of(model, prunable), replace(chosen, seed=chosen.seed + event)
        samples = cast(Data, data)
        result, _ = WEIGHT_METHODS[method](model, loss, samples, keep, quotas(layers, pattern), now, prunable)
        return result.masks(layout), result.refitted(layout)

    return select


class GradualPruner:
    """Prunes a model while it is trained; call `before_epoch` at the start of every epoch.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    >>> select = weight_selector(method="weight-magnitude")
    >>> pruner = GradualPruner(model, optimizer, select, GradualOptions(last=0.5, events=1))
    >>> pruner.before_epoch(0), int((model.weight == 0).sum())
    (0.5, 2)

    `select` comes from `weight_selector`, or is your own function. Works with any optimizer and schedule; `state_dict`
    and `load_state_dict` make a stopped run go on bit by bit as if it had not been stopped. Nothing is changed where
    `select` raises, or gives a name or shape that the model does not have.
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
        for name, value in (*weights.items(), *masks.items()):
            if name not in parameters or parameters[name].shape != value.shape:
                own = tuple(parameters[name].shape) if name in parameters else "not there"
                raise ValueError(f"select gave {name} of shape {tuple(value.shape)}; the model's is {own}")
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
