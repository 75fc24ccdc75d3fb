"""One GS-NAS training of a supernet: ProxSGD over groups of operations, dead ones taken out on the way."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.data import Batches
from espalier.nas.loop import Line, endless, rank, seed_step, wrapped
from espalier.nas.supernet import clip_scalars, operation_groups, scalars_of, stays_dead, take_out
from espalier.space.search_space import SearchSpace
from espalier.sparsify.grouping import Grouping, space_groups
from espalier.sparsify.proxsgd import ProxSGD


@dataclass(frozen=True)
class GroupSettings:
    """How ProxSGD runs.

    Fields:
        mu: weight of the penalty, before normalisation. lr: ε. rho: ρ. normalize: of μ; see ProxSGD.
        cosine: ε falls along a cosine to a tenth (else it is constant).
        clip: the largest norm of the whole gradient; 0 for none.
        patience: an operation is dead once its proximal step was zero that many steps in a row.
        drop_every: every so many steps, dead operations that cannot come back once they are at zero are put
            there, and taken out of the running supernet; 0: never.
        norms_every: every so many steps a line with all groups' norms is logged.
    """

    mu: float = 0.05
    lr: float = 0.05
    rho: float = 0.8
    normalize: str = "init"
    cosine: bool = True
    clip: float = 5.0
    patience: int = 20
    drop_every: int = 20
    norms_every: int = 20


@dataclass(frozen=True)
class Limit:
    """Where the penalty ends: ``fits(dead groups, longest first)`` returns those of them that are to go so that
    what stays is within the target, or None while it is not.
    """

    fits: Callable[[list[str]], list[str] | None]


class GroupSearch:
    """A stepper of :func:`espalier.nas.loop.advance`: ``steps`` steps over ``model``, which it changes.

    ``model`` is a supernet of cells, or any model with its ``space``, whose structures are tied into one group
    where they have the same ``key(name)``; of such a model nothing is taken out while it trains.

    ``removed`` are the groups taken out so far; :meth:`zero` names all that are dead. With a ``limit``, the
    penalty ends as soon as what stays is within it: the dead operations leave for good, those that died last
    stay if there is room, and the rest trains on without a penalty.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        settings: GroupSettings,
        steps: int,
        seed: int = 0,
        amp: bool = False,
        compiled: bool = False,
        limit: Limit | None = None,
        space: SearchSpace | None = None,
        key: Callable[[str], str] | None = None,
    ):
        self.model, self.batches, self.settings, self.steps, self.seed = model, batches, settings, steps, seed
        self.amp, self.compiled, self.limit = amp, compiled, limit
        self.ended_at = 0  # the step at which the penalty ended
        self.device = next(model.parameters()).device
        self.space, self.key = space, key
        self.names = list(self._grouping().names)
        self.removed: list[str] = []
        self.done = 0
        self._optimizer({"mu": settings.mu})
        self._data = endless(batches)
        self._sums = torch.zeros(2, device=self.device)  # loss and right answers since the last line
        self._counts = [0, 0]  # steps and images since the last line
        self._since = time.perf_counter()

    def _grouping(self) -> Grouping:
        return operation_groups(self.model) if self.space is None else space_groups(self.space, self.key)

    def _optimizer(self, state: Mapping[str, Any]) -> None:
        """An optimizer over the operations that are there; it warns about groups that are bound to vanish."""
        s = self.settings
        with warnings.catch_warnings():
            if self.removed or rank():
                warnings.simplefilter("ignore")
            self.opt = ProxSGD(self._grouping(), state["mu"], lr=s.lr, rho=s.rho, tau=1.0, normalize=s.normalize)
        self._last = sorted(stays_dead(self.model)) if self.space is None else []
        self._scalars = scalars_of(self.model)
        self.net = wrapped(self.model, self.device, self.compiled)

    def step(self) -> Line | None:
        x, y = next(self._data)
        seed_step(self.seed, self.done)
        s = self.settings
        if s.cosine:
            factor = 0.1 + 0.45 * (1 + cos(pi * self.done / self.steps))
            for group in self.opt.param_groups:
                group["lr"] = s.lr * factor
        self.model.train()
        self.opt.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits: Tensor = self.net(x)
            loss = cross_entropy(logits, y)
        loss.backward()
        if s.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.opt.step()
        clip_scalars(self._scalars)
        self.done += 1
        with torch.no_grad():
            self._sums += torch.stack([loss.detach().float(), (logits.argmax(1) == y).sum().float()])
        self._counts[0] += 1
        self._counts[1] += len(y)
        if s.drop_every and self.done % s.drop_every == 0 and self.done < self.steps:
            self._end_penalty()
            self.drop()
        return self._line() if self.done % s.norms_every == 0 or self.done == self.steps else None

    def _line(self) -> Line:
        norms = dict(zip(self.opt.grouping.names, self.opt.group_norms().tolist(), strict=True))
        loss, right = self._sums.tolist()
        zero = self.zero()
        now = time.perf_counter()
        line = {
            "step": self.done,
            "epoch": round(self.batches.epoch + self.batches.batch / len(self.batches), 4),
            "loss": round(loss / max(self._counts[0], 1), 5),
            "accuracy": round(100.0 * right / max(self._counts[1], 1), 3),
            "zero": len(zero),
            "running": len(norms),
            "step_ms": round(1e3 * (now - self._since) / max(self._counts[0], 1), 2),
            "norms": {name: float(f"{norms.get(name, 0.0):.4g}") for name in self.names},
            "dead": zero,
        }
        self._sums.zero_()
        self._counts, self._since = [0, 0], now
        return line

    # What is dead.

    def zero(self, threshold: float | None = None) -> list[str]:
        """The groups that are dead, those taken out included; by a threshold on the norm where one is given."""
        found = {*self.removed, *self.opt.zero_groups(threshold, self.settings.patience)}
        return [name for name in self.names if name in found]

    def alive(self, threshold: float | None = None) -> list[str]:
        """The groups that stay."""
        zero = set(self.zero(threshold))
        return [name for name in self.names if name not in zero]

    def drop(self) -> list[str]:
        """Take out dead operations that could not come back if they were at zero; returns their names.

        Exact: an operation of two or more layers at zero has zero gradients, and is taken out only once its
        momentum can no longer lift it over the penalty, so every other weight goes the same way, bit for
        bit, as if it were still there, at zero.
        """
        dead = set(self.opt.zero_groups(patience=self.settings.patience))
        candidates = [name for name in self._last if name in dead]
        if not candidates:
            return []
        momentum = self._momentum_norms()
        bounds = dict(zip(self.opt.grouping.names, self.opt.mu_per_group().tolist(), strict=True))
        gone = [name for name in candidates if momentum[name] <= bounds[name]]
        if gone:
            self._remove(gone)
        return gone

    def _end_penalty(self) -> None:
        if self.limit is None or self.ended_at:
            return
        dormant = dict(zip(self.opt.grouping.names, self.opt.dormant.tolist(), strict=True))
        dead = [name for name in self.names if dormant.get(name, 0) >= self.settings.patience]
        gone = self.limit.fits([*self.removed, *sorted(dead, key=lambda name: -dormant[name])])
        if gone is None:
            return
        self._remove([name for name in gone if name not in self.removed])
        self.opt.mu = 0.0
        self.ended_at = self.done

    def _momentum_norms(self) -> dict[str, float]:
        norms = self.opt.runs.norm(self.opt.state_dict()["buffers"]["v"])[: len(self.opt.grouping)]
        return dict(zip(self.opt.grouping.names, norms.tolist(), strict=True))

    def _remove(self, gone: list[str]) -> None:
        """Take operations out of the supernet and their places out of the optimizer's vectors."""
        before, sizes = self.opt.state_dict(), {n: p.numel() for n, p in self.model.named_parameters()}
        take_out(self.model, gone)
        self.removed += gone
        self._optimizer({"mu": before["mu"]})
        self.opt.load_state_dict(_narrowed(before, sizes, self.opt.state_dict()))

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "steps": self.steps,
            "removed": list(self.removed),
            "model": self.model.state_dict(),
            "optimizer": self.opt.state_dict(),
            "batches": self.batches.state_dict(),
            "sums": self._sums,
            "counts": list(self._counts),
            "ended_at": self.ended_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.done, self.steps = state["done"], state["steps"]
        self._restore(state)
        self.batches.load_state_dict(state["batches"])
        self._data = endless(self.batches)
        self._sums.copy_(state["sums"])
        self._counts = list(state["counts"])
        self.ended_at = state["ended_at"]

    def start_from(self, state: Mapping[str, Any]) -> None:
        """Begin a new training, with its own μ, from the weights and momentum that another ended with."""
        mu = self.opt.mu
        self._restore(state)
        self.opt.mu = mu
        self.opt.steps_done = 0

    def _restore(self, state: Mapping[str, Any]) -> None:
        take_out(self.model, [name for name in state["removed"] if name not in self.removed])
        self.removed = list(state["removed"])
        self._optimizer({"mu": self.opt.mu})
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])


def _narrowed(before: Mapping[str, Any], sizes: Mapping[str, int], after: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer over more parameters, cut down to the groups and parameters of ``after``."""
    names = [name for group in before["params"] for name in group]
    kept = {name for group in after["params"] for name in group}
    places = torch.cat([torch.full((sizes[name],), name in kept, dtype=torch.bool) for name in names])
    rows = torch.tensor([name in set(after["names"]) for name in before["names"]])
    buffers = {}
    for key, tensor in before["buffers"].items():
        if len(tensor) == len(places):
            buffers[key] = tensor[places.to(tensor.device)]
        else:  # one per group, or empty
            buffers[key] = tensor[rows.to(tensor.device)] if len(tensor) == len(rows) else tensor
    return {
        **before,
        "buffers": buffers,
        "dormant": before["dormant"][rows.to(before["dormant"].device)],
        "params": after["params"],
        "names": after["names"],
    }
