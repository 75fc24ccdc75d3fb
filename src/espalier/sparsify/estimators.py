"""Gradients of ``E f(z)`` with ``z ~ Ber(g(φ))`` from one or two evaluations of f (section 3 of L0-ARM).

Every estimator differentiates with respect to the logit ψ of π = g(φ), for which it is unbiased whatever g
is, and then multiplies by ``dψ/dφ = g'(φ) / (g(φ) (1 - g(φ)))``. The paper applies Theorem 1 to any
antithetic g with the constant factor k in its place, which is unbiased for the scaled sigmoid only;
``reference=True`` does the same, for comparison.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from espalier.sparsify.probability import Probability

Estimator: TypeAlias = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


def draw(phi: Tensor, g: Probability, u: Tensor) -> tuple[Tensor, Tensor]:
    """The gates ``1[u < π]`` and their antithetic partners ``1[u > 1 - π]``, for shared uniform noise u.

    ``u`` is [V], or [S, V] for S independent samples; the gates have its shape and dtype.
    """
    pi = g(phi)
    return (u < pi).to(u.dtype), (u > 1.0 - pi).to(u.dtype)


def ar(f: Tensor, partner: Tensor | None, u: Tensor, pi: Tensor) -> Tensor:
    """Augment-REINFORCE, Eq. (10): ``f(1[u < π]) (1 - 2u)``; one evaluation, the highest variance."""
    return f.unsqueeze(-1) * (1.0 - 2.0 * u)


def arm(f: Tensor, partner: Tensor | None, u: Tensor, pi: Tensor) -> Tensor:
    """Augment-REINFORCE-merge, Eq. (9): ``(f(1[u > 1 - π]) - f(1[u < π])) (u - 1/2)``; two evaluations."""
    assert partner is not None
    return (partner - f).unsqueeze(-1) * (u - 0.5)


def disarm(f: Tensor, partner: Tensor | None, u: Tensor, pi: Tensor) -> Tensor:
    """ARM with the uniform noise integrated out given both gates (Dong, Mnih & Tucker, 2020).

    ``1/2 (f(z) - f(z')) (z - z') max(π, 1 - π)``: ARM's cost, less variance.
    """
    assert partner is not None
    difference = (u < pi).to(u.dtype) - (u > 1.0 - pi).to(u.dtype)
    return 0.5 * (f - partner).unsqueeze(-1) * difference * torch.maximum(pi, 1.0 - pi)


ESTIMATORS: dict[str, Estimator] = {"ar": ar, "arm": arm, "disarm": disarm}


def gradient(
    name: str,
    f: Tensor,
    partner: Tensor | None,
    u: Tensor,
    phi: Tensor,
    g: Probability,
    reference: bool = False,
) -> Tensor:
    """The estimate of ``d E f / dφ`` [V], averaged over samples.

    >>> from espalier.sparsify.probability import Sigmoid
    >>> phi, u = torch.tensor([0.0, 0.0]), torch.tensor([[0.1, 0.7], [0.9, 0.2]])
    >>> z, partner = draw(phi, Sigmoid(), u)
    >>> f = lambda gates: (gates - 0.4).square().sum(-1)
    >>> gradient("arm", f(z), f(partner), u, phi, Sigmoid()).shape
    torch.Size([2])

    ``f`` and ``partner`` are the losses at the gates and at their antithetic partners: [S], or scalars where
    ``u`` is [V] (gates shared by the batch, f the batch's mean loss). With one draw per example, give each
    example's own loss: S is then the batch size and the average is over examples. A gate whose g is flat
    (a saturated hard sigmoid) has gradient 0. ``reference=True``: the paper's factor k for every g.
    """
    per_sample = ESTIMATORS[name](f, partner, u, g(phi))
    slope = torch.full_like(phi, g.k) if reference else g.logit_slope(phi)
    return (per_sample.mean(0) if per_sample.ndim > 1 else per_sample) * slope
