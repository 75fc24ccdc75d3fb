"""Losses and gradients that are not finite, found without making an accelerator wait."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from espalier.errors import TrainingError
from espalier.sparsify import foreach

_ADVICE = "lower the learning rate or clip gradients."


class Watch:
    """Raises :class:`TrainingError` for a step that is not finite: at once, or ``lag`` steps later.

    >>> watch = Watch()
    >>> watch.see(torch.tensor(0.5), {"0.weight": torch.ones(3)})
    >>> watch.see(torch.tensor(0.5), {"0.weight": torch.tensor([1.0, float("nan")])})
    Traceback (most recent call last):
    espalier.errors.TrainingError: the gradient of '0.weight' is not finite: lower the learning rate or clip gradients.

    With a lag the answer is copied to the CPU while the device goes on, and read that many calls later: by then it has
    arrived, and all ranks of a distributed run read the same one in the same step.
    """

    def __init__(self, lag: int = 0):
        self.lag = lag
        self._pending: deque[tuple[Tensor, Callable[[], None]]] = deque()

    def see(self, loss: Tensor, gradients: Mapping[str, Tensor], own: float | None = None) -> None:
        """``loss`` [] is that of all ranks together; ``own`` this rank's, where the caller knows it."""
        dense = {name: g._values() if g.is_sparse else g for name, g in gradients.items()}
        filled = [g for g in dense.values() if g.numel()]
        if self.lag == 0:
            # Squares may overflow, and are looked at again then; finding the largest takes a CPU 25 times as long.
            sizes = float(foreach.norms(filled).sum()) if filled else 0.0
            fault = "" if math.isfinite(float(loss) + sizes) else _fault(loss, dense, own)
            if fault:
                raise TrainingError(fault)
            return
        largest = foreach.norms(filled, math.inf).amax() if filled else loss.new_zeros(())
        self._pending.append(_sent(torch.isfinite(loss + largest)))
        if len(self._pending) > self.lag:
            is_finite, wait = self._pending.popleft()
            wait()
            if not bool(is_finite):
                raise TrainingError(
                    f"the loss or a gradient was not finite {self.lag} steps ago, and all after it is lost: {_ADVICE}"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {"lag": self.lag, "_pending": deque()}  # what waits for a device cannot be copied


def _sent(flag: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """The flag on its way to the CPU, and what to call before it is read."""
    if flag.device.type != "cuda":
        return flag, lambda: None
    host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived.synchronize


def _fault(loss: Tensor, gradients: Mapping[str, Tensor], own: float | None) -> str:
    """What is not finite; empty where it was the sum of squares alone."""
    if not math.isfinite(float(loss)):
        value = float(loss) if own is None else own
        if math.isfinite(value):
            return f"the loss of another rank is not finite: {_ADVICE}"
        return f"the loss is {value}: {_ADVICE}"
    bad = next((name for name, g in gradients.items() if not bool(torch.isfinite(g).all())), None)
    return "" if bad is None else f"the gradient of '{bad}' is not finite: {_ADVICE}"
