"""What a network costs: parameters, and multiply-accumulates per example."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """``params``: number of parameter elements, shared ones once. ``macs``: per example of the batch."""

    params: int
    macs: int

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.params - other.params, self.macs - other.macs)


def count_params(model: nn.Module) -> int:
    """Elements of all parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> int:
    """Multiply-accumulates per example, on shapes alone: nothing is computed.

    >>> count_macs(nn.Linear(4, 3), (torch.randn(2, 4),))
    12

    Counts convolutions, matrix products and attention, as ``torch.utils.flop_counter`` does (which counts each
    twice: a FLOP is half a MAC).
    """
    with (
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        FlopCounterMode(display=False) as counter,
    ):
        fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, dict(kwargs or {})))
        state: dict[str, torch.Tensor] = {
            name: mode.from_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())
        }
        modes = [(m, m.training) for m in model.modules()]
        try:
            model.eval()
            torch.func.functional_call(model, state, fake_args, fake_kwargs, tie_weights=True)
        finally:
            for module, training in modes:
                module.training = training
    batch = next((t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim), 1)
    return counter.get_total_flops() // 2 // max(int(batch), 1)


def measure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Cost:
    """Parameters and MACs of ``model``."""
    return Cost(count_params(model), count_macs(model, args, kwargs))
