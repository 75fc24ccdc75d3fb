"""Regularised dual averaging with momentum, plain and adaptive, which finds the support in finite time."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify.grouping import Grouping
from espalier.sparsify.penalised import Penalised
from espalier.sparsify.prox import box, combined_, group_l21_in_box, group_l21_per_element, soft_threshold
from espalier.sparsify.refusals import in_unit_interval, squarable


class RMDA(Penalised):
    """RMDA (Huang & Lee, "Training Structured Neural Networks Through Manifold Identification and Variance
    Reduction", ICLR 2022, Algorithm 1), with the penalty of :class:`ProxSGD`: groups, L1 and a box.

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
        ŵ = prox of (α_t / β_t) r  at  w_0 - v / β_t        r(w) = Σ μ_k |w_k| + sparsity |w|₁, in the box
        w ← w + c (ŵ - w)

    where c is ``momentum``, in ``param_groups`` "c": it weighs the new, and no scheduler may cycle it as a momentum.
    The variance of v / α_t falls, so that from some step on ŵ has the support of the limit; ProxSGD with constant
    steps has no such guarantee. ``restart()`` begins anew from the present weights, as the authors do whenever ``lr``
    changes; call it too when frozen parameters are trained again. ``lr`` is positive (a scheduler may come to 0) and
    one for all parameters. Other arguments (``normalize``, ``sparsity``, ``low``, ``high``, …), the warning of groups
    that are bound to be zeroed, and errors as of :class:`ProxSGD`.
    """

    def __init__(
        self,
        grouping: Grouping,
        mu: float,
        *,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        lr: float = 0.1,
        momentum: float = 0.1,
        normalize: str = "none",
        exponent: float = 0.5,
        sparsity: float = 0.0,
        low: float | None = None,
        high: float | None = None,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "c": momentum, "weight_decay": weight_decay}
        defaults |= {"sparsity": sparsity, "low": low, "high": high}
        super().__init__(grouping, mu, params, defaults, normalize, exponent)
        if not all(group["lr"] > 0.0 for group in self.param_groups):
            raise TrainingError(f"lr = {lr}: lr is positive.")
        self._v = torch.zeros_like(self._w)
        self._start = torch.zeros_like(self._w)
        self._alpha = torch.zeros((), dtype=torch.float64)
        self._since = torch.zeros((), dtype=torch.long)
        self.restart()
        self._warn_at_start()

    def _check_values(self) -> None:
        super()._check_values()
        for group in self.param_groups:
            in_unit_interval("momentum (c)", group["c"])
            if not 0.0 <= group["lr"] < float("inf"):
                raise TrainingError(f"lr = {group['lr']}: lr is positive, and finite.")
        if len({float(group["lr"]) for group in self.param_groups}) > 1:
            raise TrainingError(f"{type(self).__name__} takes one lr for all parameters: its α is one number.")

    def _warn_at_start(self) -> None:
        self._pulls = "|w| / lr"
        self._warn_from(self._initial / float(self.param_groups[0]["lr"]))

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
        beta, rate = float(self._since) ** 0.5, float(self.param_groups[0]["lr"])
        self._alpha += rate * beta
        return beta, rate * beta

    def _update(self, w: Tensor, g: Tensor) -> Tensor:
        beta, size = self._advance()
        self._v.add_(g, alpha=size)
        b = torch.add(self._start, self._v, alpha=-1.0 / beta, out=g)
        low, high, boxed = self._box()
        mu = self._unit * (self.mu * float(self._alpha) / beta)
        sparsity = self.per_element("sparsity") * (float(self._alpha) / beta)
        left = combined_(b, self.runs, mu, 1.0, sparsity, low, high, boxed)
        w.lerp_(b, self.per_element("c"))
        return left

    def _memory(self) -> list[Tensor]:
        return [self._v]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue where :meth:`state_dict` was taken. Raises :class:`TrainingError` for a state of other groups or
        settings.
        """
        groups = state_dict.get("param_groups", [])
        groups = [{"c" if k == "momentum" else k: v for k, v in g.items()} for g in groups]  # its name in older states
        super().load_state_dict({**state_dict, "param_groups": groups})

    def _buffers(self) -> dict[str, Tensor]:
        more = {"v": self._v, "start": self._start, "alpha": self._alpha, "since": self._since}
        return {**super()._buffers(), **more}


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
        ŵ = argmin_w  ⟨v, w⟩ + 1/2 ⟨w - w_0, p (w - w_0)⟩ + α_t r(w)
        w ← w + c (ŵ - w)

    The subproblem is solved by one equation per group (:func:`espalier.sparsify.prox.group_l21_per_element`), where
    the authors take proximal gradient steps; which groups are zero is exact in both. An L1 penalty comes first there,
    and a box as in :func:`espalier.sparsify.prox.group_l21_in_box`. Arguments as of :class:`RMDA`. No group
    is called bound to be zeroed: with P growing, one that is zero at first may well come back.
    """

    def __init__(
        self,
        grouping: Grouping,
        mu: float,
        *,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        lr: float = 0.01,
        momentum: float = 0.1,
        normalize: str = "none",
        exponent: float = 0.5,
        sparsity: float = 0.0,
        low: float | None = None,
        high: float | None = None,
        weight_decay: float = 0.0,
        epsilon: float = 1e-6,
    ):
        self.epsilon = epsilon
        super().__init__(
            grouping,
            mu,
            params=params,
            lr=lr,
            momentum=momentum,
            normalize=normalize,
            exponent=exponent,
            sparsity=sparsity,
            low=low,
            high=high,
            weight_decay=weight_decay,
        )

    def _check_values(self) -> None:
        super()._check_values()
        if not 0.0 < self.epsilon < float("inf"):
            raise TrainingError(f"epsilon={self.epsilon}: positive.")

    def _warn_at_start(self) -> None:
        """Nothing: p grows with the gradients, so that a group which is zero at first is not bound to stay so."""

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
        alpha = float(self._alpha)
        mu, sparsity = self._unit * (self.mu * alpha), self.per_element("sparsity")
        if isinstance(sparsity, Tensor) or sparsity:
            b = soft_threshold(b, sparsity * alpha / p)
        low, high, boxed = self._box()
        new, norms = group_l21_per_element(box(b, low, high), self.runs, mu, p, self._norms)
        self._norms = norms * (self.runs.norm(new) > 0)
        if boxed is not None:
            at, groups = boxed.at, boxed.groups
            sides = boxed.of_each(low), boxed.of_each(high)
            new[at], self._norms[groups] = group_l21_in_box(b[at], boxed.runs, mu[groups], p[at], *sides)
        w.lerp_(new, self.per_element("c"))
        return self._norms

    def _memory(self) -> list[Tensor]:
        return [self._v, self._u]

    def _largest(self) -> float:
        return squarable(self._w.dtype)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "epsilon": self.epsilon}

    def _buffers(self) -> dict[str, Tensor]:
        return {**super()._buffers(), "u": self._u, "norms": self._norms}
