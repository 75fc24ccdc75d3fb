"""Regularised dual averaging with momentum, plain and adaptive, which finds the support in finite time."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify.flat import FlatProximal
from espalier.sparsify.grouping import Grouping
from espalier.sparsify.prox import group_l21_per_element, shrink_factor


class RMDA(FlatProximal):
    """RMDA (Huang & Lee, "Training Structured Neural Networks Through Manifold Identification and Variance
    Reduction",
    ICLR 2022, Algorithm 1), with the group norm of GSparsity.

    >>> from espalier.sparsify import RMDA, layer_groups
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> opt = RMDA(layer_groups(model, ["0"]), mu=1e-3, lr=0.1)
    >>> x = torch.randn(16, 4)
    >>> for _ in range(2):
    ...     opt.zero_grad()
    ...     model(x).square().mean().backward()
    ...     opt.step()
    >>> opt.steps_done
    2

    With t = 1, 2, …, β_t = √t, s_t = lr β_t and α_t = Σ s_j:

        v ← v + s_t g
        ŵ = prox of (α_t / β_t) Σ μ_k |w_k|  at  w_0 - v / β_t
        w ← w + c (ŵ - w)

    where c is ``momentum``. The variance of v / α_t falls, so that from some step on ŵ has the support of the
    limit; ProxSGD with constant steps has no such guarantee. ``restart()`` begins anew from the present
    weights, as the authors do whenever ``lr`` changes. Arguments and errors otherwise as of :class:`ProxSGD`.
    """

    def __init__(
        self,
        grouping: Grouping,
        mu: float,
        *,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        lr: float = 0.1,
        momentum: float = 0.1,
        weight_decay: float = 0.0,
    ):
        if mu < 0.0 or weight_decay < 0.0 or lr <= 0.0:
            raise TrainingError("mu and weight_decay are at least 0, and lr is positive.")
        if not 0.0 < momentum <= 1.0:
            raise TrainingError(f"momentum (c) = {momentum}: lies in (0, 1].")
        super().__init__(grouping, params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.mu = mu
        self._v = torch.zeros_like(self._w)
        self._start = torch.zeros_like(self._w)
        self._alpha = torch.zeros((), dtype=torch.float64)
        self._since = torch.zeros((), dtype=torch.long)
        self._mask = torch.zeros(self.runs.count, dtype=self._w.dtype, device=self._w.device)
        self._mask[: len(grouping)] = 1.0
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past gradients and take the present weights as w_0."""
        self._start.copy_(self._gather())
        self._v.zero_()
        self._alpha.zero_()
        self._since.zero_()

    def _advance(self) -> tuple[float, float]:
        """Count the step; √t and s_t, with α_t brought up to date."""
        self._since += 1
        beta, rate = float(self._since) ** 0.5, self.per_element("lr")
        if isinstance(rate, Tensor):
            raise TrainingError(f"{type(self).__name__} takes one lr for all parameters: its α is one number.")
        self._alpha += rate * beta
        return beta, rate * beta

    def _update(self, w: Tensor, g: Tensor) -> Tensor:
        beta, size = self._advance()
        self._v.add_(g, alpha=size)
        b = torch.add(self._start, self._v, alpha=-1.0 / beta, out=g)
        factor = shrink_factor(self.runs.norm(b), self._mask * (self.mu * float(self._alpha) / beta))
        w.lerp_(b.mul_(self.runs.spread(factor)), self.per_element("momentum"))
        return factor

    def _buffers(self) -> dict[str, Tensor]:
        return {"v": self._v, "start": self._start, "alpha": self._alpha, "since": self._since}


class RAMDA(RMDA):
    """RAMDA (Huang & Lee, "Regularized Adaptive Momentum Dual Averaging with an Efficient Inexact Subproblem Solver
    for Training Structured Neural Networks", NeurIPS 2024, Algorithm 1): RMDA in the metric of past gradients.

    >>> from espalier.sparsify import RAMDA, layer_groups
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> opt = RAMDA(layer_groups(model, ["0"]), mu=1e-3, lr=0.01)
    >>> x = torch.randn(16, 4)
    >>> for _ in range(2):
    ...     opt.zero_grad()
    ...     model(x).square().mean().backward()
    ...     opt.step()
    >>> opt.steps_done
    2

    With t = 1, 2, …, s_t = lr √t and α_t = Σ s_j:

        v ← v + s_t g        u ← u + s_t g²        p = ∛u + epsilon
        ŵ = argmin_w  ⟨v, w⟩ + 1/2 ⟨w - w_0, p (w - w_0)⟩ + α_t Σ μ_k |w_k|
        w ← w + c (ŵ - w)

    The subproblem is solved by one equation per group (:func:`espalier.sparsify.prox.group_l21_per_element`), where
    the authors take proximal gradient steps; which groups are zero is exact in both. Arguments as of :class:`RMDA`.
    """

    def __init__(
        self,
        grouping: Grouping,
        mu: float,
        *,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        lr: float = 0.01,
        momentum: float = 0.1,
        weight_decay: float = 0.0,
        epsilon: float = 1e-6,
    ):
        if epsilon <= 0.0:
            raise TrainingError(f"epsilon={epsilon}: positive.")
        self.epsilon = epsilon
        super().__init__(grouping, mu, params=params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past gradients and take the present weights as w_0."""
        super().restart()
        self._u = torch.zeros_like(self._w)
        self._norms = self._w.new_zeros(self.runs.count)  # of the last ŵ, from where the next is sought

    def _update(self, w: Tensor, g: Tensor) -> Tensor:
        _, size = self._advance()
        self._v.add_(g, alpha=size)
        self._u.addcmul_(g, g, value=size)
        p = self._u.pow(1.0 / 3.0).add_(self.epsilon)
        b = torch.addcdiv(self._start, self._v, p, value=-1.0, out=g)
        mu = self._mask * (self.mu * float(self._alpha))
        new, self._norms = group_l21_per_element(b, self.runs, mu, p, self._norms)
        w.lerp_(new, self.per_element("momentum"))
        return self._norms

    def _buffers(self) -> dict[str, Tensor]:
        return {**super()._buffers(), "u": self._u, "norms": self._norms}
