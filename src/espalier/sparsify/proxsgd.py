"""ProxSGD (Yang et al., 2020) with group sparsity, as GSparsity uses it."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify.grouping import Grouping
from espalier.sparsify.penalised import Penalised
from espalier.sparsify.prox import combined_
from espalier.sparsify.refusals import in_unit_interval, squarable
from espalier.sparsify.schedule import PowerDecay

PAPER: dict[str, Any] = {"lr": 1e-3, "rho": 0.8, "tau": 1.0, "normalize": "div"}


class ProxSGD(Penalised):
    """Stochastic proximal gradient with momentum: groups that do not help become exactly zero.

    >>> from espalier.sparsify import ProxSGD, layer_groups
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> opt = ProxSGD(layer_groups(model, ["0"]), mu=0.05, lr=0.1, rho=0.5)
    >>> x = torch.randn(64, 4)
    >>> for _ in range(300):
    ...     opt.zero_grad()
    ...     (model(x)[:, 0] - x[:, 0]).square().mean().backward()
    ...     opt.step()
    >>> len(opt.snap()) == int((model[0].weight.norm(dim=1) == 0).sum())
    True

    One step, for gradient g (GSparsity, section 2, with the closed form of (1a) in place of the misprinted
    (1b)):

        v ← (1 - ρ(t)) v + ρ(t) g        b = w - v / τ
        ŵ_k = max(0, 1 - μ_k / (τ_k |b_k|)) b_k
        w ← w + ε(t) (ŵ - w)

    A group whose ŵ is zero decays by 1 - ε a step and never arrives: which groups are zero is therefore read
    off ŵ, not w, and :meth:`snap` puts them there at the end.

    The network that is left after removal equals the snapped model, but for norms over channels of which some go
    (layer, group and RMS norms: a transformer's residual stream): the small network's statistics are over what
    stays, as in ``space.masked(solution)``, which it equals; the snapped model's count the zeros. Then judge and
    fine-tune ``space.masked(solution)``, or use the levels "head" and "segment", or exclude the stream with ``keep=``.

    Under torchrun gradients must be averaged over the ranks (DistributedDataParallel); :meth:`check_ranks` checks.

    Args:
        grouping: which elements form a group; all others are trained without penalty.
        mu: weight of the penalty, before normalisation.
        lr: ε, in (0, 1]. Schedulers change it as any optimizer's ``lr``, and may come to 0, where nothing moves.
        rho: ρ, weight of the new gradient, in (0, 1].
        tau: τ > 0, or "adaptive": the mean over the group of √(running mean of g²) (one per group, as the
            closed form needs; one per tensor for what is in no group).
        normalize: of μ per group of n elements: "none"; "div", μ / n^exponent (the paper's); "mul", μ
            n^exponent (the usual group lasso); "init", μ |w_k(0)|, where a group that starts at zero gets the norm
            it would have at the scale of the others.
        schedule: multiplies ε and ρ; ``PowerDecay`` meets Theorem 1. None: constants.
        sparsity, low, high: an L1 penalty and a box that holds 0, on all trained parameters or, in ``params``, for
            some: ``[{"params": weights}, {"params": scalars, "low": 0.0, "high": 1.0}]`` is GSparsity's clip of
            the scalars of operations without parameters. A group norm in a box of two sides is solved by one
            equation per group.
        weight_decay: added to the gradient as weight_decay · w.

    ``lr``, ``rho``, ``weight_decay``, ``sparsity``, ``low`` and ``high`` may differ in ``params`` and ``param_groups``;
    all else is one for all parameters, μ too, and refused there. Parameters frozen later hold still, with their groups.

    ``PAPER`` holds the constants of the paper's search. Warns where a group is bound to be zeroed whatever
    the data. Raises :class:`TrainingError` for values outside these ranges, also where set later, for gradients that
    are not finite (with an adaptive τ also those too large to be squared), for complex parameters, and for groups of
    which a part is frozen.
    """

    def __init__(
        self,
        grouping: Grouping,
        mu: float,
        *,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        lr: float = 1e-3,
        rho: float = 0.8,
        tau: float | str = 1.0,
        normalize: str = "none",
        exponent: float = 0.5,
        schedule: PowerDecay | None = None,
        sparsity: float = 0.0,
        low: float | None = None,
        high: float | None = None,
        weight_decay: float = 0.0,
        beta: float = 0.999,
        delta: float = 1e-8,
    ):
        self.tau, self.schedule, self.beta, self.delta = tau, schedule, beta, delta
        in_unit_interval("lr (ε)", lr)
        defaults = {"lr": lr, "rho": rho, "weight_decay": weight_decay}
        defaults |= {"sparsity": sparsity, "low": low, "high": high}
        super().__init__(grouping, mu, params, defaults, normalize, exponent)
        for group in self.param_groups:
            in_unit_interval("lr (ε)", group["lr"])
        self._v = torch.zeros_like(self._w)
        self._r = torch.zeros_like(self._w if tau == "adaptive" else self._w[:0])
        self._size = self.runs.sum(torch.ones_like(self._w))
        self._pulls = "tau |w|"
        if not isinstance(tau, str):
            self._warn_from(tau * self._initial)

    def _check_values(self) -> None:
        super()._check_values()
        for group in self.param_groups:
            in_unit_interval("lr (ε)", group["lr"], zero=True)  # a scheduler may come to 0
            in_unit_interval("rho (ρ)", group["rho"])
        tau = self.tau
        if tau != "adaptive" and (isinstance(tau, str) or not 0.0 < tau < float("inf")):
            raise TrainingError(f"tau={tau!r}: a positive number, or 'adaptive'.")
        if not 0.0 <= self.beta < 1.0:
            raise TrainingError(f"beta={self.beta}: lies in [0, 1).")
        if not 0.0 < self.delta < float("inf"):
            raise TrainingError(f"delta={self.delta}: positive.")

    def _update(self, w: Tensor, g: Tensor) -> Tensor:
        of_step, of_momentum = self.schedule.factors(self.steps_done) if self.schedule else (1.0, 1.0)
        rate, momentum = self.per_element("lr"), self.per_element("rho")
        tau: Tensor | float
        if isinstance(self.tau, str):
            self._r.mul_(self.beta).addcmul_(g, g, value=1.0 - self.beta)
            corrected = (self._r / (1.0 - self.beta ** (self.steps_done + 1))).sqrt()
            tau = self.runs.sum(corrected) / self._size + self.delta
            if self.steps_done == 0:
                self._warn_from(tau[: len(self.grouping)] * self._initial)
        else:
            tau = self.tau
        self._v.lerp_(g, momentum * of_momentum)
        if isinstance(tau, Tensor):
            b = g.copy_(w).addcdiv_(self._v, self.runs.spread(tau), value=-1.0)
        else:
            b = torch.add(w, self._v, alpha=-1.0 / tau, out=g)
        low, high, boxed = self._box()
        left = combined_(b, self.runs, self._mu_k, tau, self.per_element("sparsity"), low, high, boxed)
        w.lerp_(b, rate * of_step)
        return left

    def _memory(self) -> list[Tensor]:
        return [self._v, self._r] if isinstance(self.tau, str) else [self._v]

    def _largest(self) -> float:
        return squarable(self._w.dtype) if isinstance(self.tau, str) else super()._largest()

    def _settings(self) -> dict[str, Any]:
        schedule = None if self.schedule is None else asdict(self.schedule)
        more = {"tau": self.tau, "beta": self.beta, "delta": self.delta, "schedule": schedule}
        return {**super()._settings(), **more}

    def _buffers(self) -> dict[str, Tensor]:
        return {**super()._buffers(), "v": self._v, "r": self._r}
