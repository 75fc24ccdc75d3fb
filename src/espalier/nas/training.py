"""Ordinary training of a network, as a stepper: SGD (or H2SPG) with a cosine, drop-path, auxiliary head."""

import time
from collections.abc import Mapping
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from espalier.data import Batches
from espalier.nas.loop import Line, endless, seed_step, wrapped
from espalier.nas.supernet import cells_of


class Training:
    """A stepper of :func:`espalier.nas.loop.advance`.

    Args:
        model, opt: what is trained, and how; ``opt`` has ``param_groups`` with ``lr``.
        lr: at the start; it falls to zero along a cosine over ``steps``, epoch by epoch as published where
            ``by_epoch``.
        clip: the largest norm of the whole gradient; 0 for none.
        drop_path: the probability at the end; it rises linearly.
        auxiliary: weight of the second classifier's loss.
        every: a line is logged every so many steps.
    """

    def __init__(
        self,
        model: nn.Module,
        opt: Optimizer,
        batches: Batches,
        steps: int,
        lr: float,
        seed: int = 0,
        clip: float = 5.0,
        drop_path: float = 0.0,
        auxiliary: float = 0.0,
        every: int = 0,
        amp: bool = False,
        compiled: bool = False,
        by_epoch: bool = False,
    ):
        self.model, self.opt, self.batches, self.steps, self.lr, self.seed = model, opt, batches, steps, lr, seed
        self.clip, self.drop_path, self.auxiliary, self.amp = clip, drop_path, auxiliary, amp
        self.every, self.by_epoch = every or len(batches), by_epoch
        self.device = next(model.parameters()).device
        self.net = wrapped(model, self.device, compiled)
        self.done = 0
        self._data = endless(batches)
        self._sums, self._counts = torch.zeros(2, device=self.device), [0, 0]
        self._since = time.perf_counter()

    def progress(self) -> float:
        """0 at the start, towards 1."""
        whole = len(self.batches) if self.by_epoch else 1
        return (self.done // whole * whole) / max(self.steps, 1)

    def step(self) -> Line | None:
        x, y = next(self._data)
        seed_step(self.seed, self.done)
        share = self.progress()
        for group in self.opt.param_groups:
            group["lr"] = 0.5 * self.lr * (1 + cos(pi * share))
        if self.drop_path:
            for cell in cells_of(self.model).values():
                cell.drop_path = self.drop_path * share
        self.model.train()
        self.opt.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            out = self.net(x)
            logits: Tensor = out[0] if isinstance(out, tuple) else out
            loss = cross_entropy(logits, y)
            if isinstance(out, tuple):
                loss = loss + self.auxiliary * cross_entropy(out[1], y)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.opt.step()
        self.done += 1
        with torch.no_grad():
            self._sums += torch.stack([loss.detach().float(), (logits.argmax(1) == y).sum().float()])
        self._counts = [self._counts[0] + 1, self._counts[1] + len(y)]
        return self._line() if self.done % self.every == 0 or self.done == self.steps else None

    def _line(self) -> Line:
        loss, right = self._sums.tolist()
        now = time.perf_counter()
        line = {
            "step": self.done,
            "epoch": round(self.batches.epoch + self.batches.batch / len(self.batches), 4),
            "loss": round(loss / self._counts[0], 5),
            "accuracy": round(100.0 * right / self._counts[1], 3),
            "step_ms": round(1e3 * (now - self._since) / self._counts[0], 2),
        }
        self._sums.zero_()
        self._counts, self._since = [0, 0], now
        return line

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.opt.state_dict(),
            "batches": self.batches.state_dict(),
            "sums": self._sums,
            "counts": list(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self._data = endless(self.batches)
        self._sums.copy_(state["sums"])
        self._counts = list(state["counts"])
