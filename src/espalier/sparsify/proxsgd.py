"""ProxSGD (Yang et al., 2020) with group sparsity, as GSparsity uses it."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify.flat import FlatProximal
from espalier.sparsify.grouping import Grouping
from espalier.sparsify.prox import box, l1, shrink_factor
from espalier.sparsify.schedule import PowerDecay

PAPER: dict[str, Any] = {"lr": 1e-3, "rho": 0.8, "tau": 1.0, "normalize": "div"}
NORMALIZATIONS = ("none", "div", "mul", "init")


class ProxSGD(FlatProximal):
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

    Args:
        grouping: which elements form a group; all others are trained without penalty.
        mu: weight of the penalty, before normalisation.
        lr: ε, in (0, 1]. Schedulers change it as any optimizer's ``lr``.
        rho: ρ, weight of the new gradient, in (0, 1].
        tau: τ > 0, or "adaptive": the mean over the group of √(running mean of g²) (one per group, as the
            closed form needs; one per tensor for what is in no group).
        normalize: of μ per group of n elements: "none"; "div", μ / n^exponent (the paper's); "mul", μ
            n^exponent (the usual group lasso); "init", μ |w_k(0)|.
        schedule: multiplies ε and ρ; ``PowerDecay`` meets Theorem 1. None: constants.
        sparsity, low, high: an L1 penalty and a box on all trained parameters, where the sum has a closed
            form.
        weight_decay: added to the gradient as weight_decay · w.

    ``PAPER`` holds the constants of the paper's search. Warns where a group is bound to be zeroed whatever
    the data. Raises :class:`TrainingError` for values outside these ranges and for gradients that are not
    finite.
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
        if tau != "adaptive" and (isinstance(tau, str) or tau <= 0.0):
            raise TrainingError(f"tau={tau!r}: a positive number, or 'adaptive'.")
        if normalize not in NORMALIZATIONS:
            raise TrainingError(f"normalize={normalize!r}: there are {', '.join(NORMALIZATIONS)}.")
        if (low, high) not in ((None, None), (0.0, None), (None, 0.0)):
            raise TrainingError("a group norm within a box has no closed form: bound one side at 0.")
        if mu < 0.0 or sparsity < 0.0 or weight_decay < 0.0:
            raise TrainingError("mu, sparsity and weight_decay are at least 0.")
        super().__init__(grouping, params, {"lr": lr, "rho": rho, "weight_decay": weight_decay})
        self._check_rates()
        self.tau, self.schedule, self.beta, self.delta = tau, schedule, beta, delta
        self.sparsity, self.low, self.high = sparsity, low, high
        self.normalize, self.exponent = normalize, exponent
        self._v = torch.zeros_like(self._w)
        self._r = torch.zeros_like(self._w if tau == "adaptive" else self._w[:0])
        self._initial = self.group_norms().clone()
        self._scale = self._normalizer()
        self._size = self.runs.sum(torch.ones_like(self._w))
        self.mu = mu
        self._warn_if_bound()

    @property
    def mu(self) -> float:
        """The weight of the penalty before normalisation; may be changed between steps."""
        return self._mu

    @mu.setter
    def mu(self, value: float) -> None:
        if value < 0.0:
            raise TrainingError(f"mu={value}: at least 0.")
        self._mu = float(value)
        hidden = self._scale.new_zeros(self.runs.count - len(self.grouping))
        self._mu_k = torch.cat([self._scale * value, hidden])

    def mu_per_group(self) -> Tensor:
        """μ_k of every group [groups]."""
        return self._mu_k[: len(self.grouping)]

    def objective(self) -> Tensor:
        """The penalty ``Σ μ_k |w_k|`` of Eq. (2) at the present weights."""
        return (self.mu_per_group() * self.group_norms()).sum()

    def bound_to_vanish(self) -> list[str]:
        """Groups with μ_k > τ |w_k(0)|: zeroed at the first step unless ρ times their gradient's norm exceeds
        the gap.
        """
        if isinstance(self.tau, str):
            return []
        bound = (self.mu_per_group() > self.tau * self._initial) & (self._initial > 0)
        chosen = bound.nonzero().flatten().tolist()
        return [self.grouping.names[i] for i in chosen]

    def _warn_if_bound(self) -> None:
        names = self.bound_to_vanish()
        if names:
            i = self.grouping.names.index(names[0])
            warnings.warn(
                f"{len(names)} of {len(self.grouping)} groups are bound to be zeroed whatever the data, "
                f"unless their gradients are huge: for '{names[0]}', mu = {float(self._mu_k[i]):.3g} against "
                f"an initial norm of {float(self._initial[i]):.3g}. Lower mu, or normalise it differently "
                f"(now '{self.normalize}').",
                stacklevel=3,
            )

    def _normalizer(self) -> Tensor:
        size = self.grouping.size.to(self._w)
        if self.normalize == "init":
            return self._initial
        power = {"none": 0.0, "div": -self.exponent, "mul": self.exponent}[self.normalize]
        return size**power

    def _check_rates(self) -> None:
        for group in self.param_groups:
            for key, name in (("lr", "lr (ε)"), ("rho", "rho (ρ)")):
                if not 0.0 < group[key] <= 1.0:
                    raise TrainingError(f"{name} = {group[key]}: lies in (0, 1].")

    def _update(self, w: Tensor, g: Tensor) -> Tensor:
        of_step, of_momentum = self.schedule.factors(self.steps_done) if self.schedule else (1.0, 1.0)
        rate, momentum = self.per_element("lr"), self.per_element("rho")
        tau: Tensor | float
        if isinstance(self.tau, str):
            self._r.mul_(self.beta).addcmul_(g, g, value=1.0 - self.beta)
            corrected = (self._r / (1.0 - self.beta ** (self.steps_done + 1))).sqrt()
            tau = self.runs.sum(corrected) / self._size + self.delta
        else:
            tau = self.tau
        self._v.lerp_(g, momentum * of_momentum)
        if isinstance(tau, Tensor):
            b = g.copy_(w).addcdiv_(self._v, self.runs.spread(tau), value=-1.0)
        else:
            b = torch.add(w, self._v, alpha=-1.0 / tau, out=g)
        if self.sparsity:
            b = l1(b, self.sparsity, self.runs.spread(tau) if isinstance(tau, Tensor) else tau)
        if self.low is not None or self.high is not None:
            b = box(b, self.low, self.high)
        factor = shrink_factor(self.runs.norm(b), self._mu_k, tau)
        w.lerp_(b.mul_(self.runs.spread(factor)), rate * of_step)
        return factor

    def _buffers(self) -> dict[str, Tensor]:
        return {"v": self._v, "r": self._r, "initial": self._initial}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, the model aside."""
        return {**super().state_dict(), "mu": self.mu}

    def load_state_dict(self, state_dict: Any) -> None:
        """Continue where :meth:`state_dict` was taken."""
        super().load_state_dict(state_dict)
        self._scale = self._normalizer()
        self.mu = state_dict["mu"]
