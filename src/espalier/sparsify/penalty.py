"""Expected norms of gated parameters ``θ = θ̃ z`` with ``z ~ Ber(π)`` (Eqs. 15 to 18 of L0-ARM).

Exact for binary gates. For hard concrete gates, which lie between 0 and 1, π = P(z ≠ 0) gives ``E|θ|₀`` exactly, but
``E|θ|`` and ``E|θ|²`` only from above, as Louizos et al. (2018) use them: E z² <= E z <= P(z ≠ 0).
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from espalier.sparsify.folding import along


def expected_l0(pi: Tensor, size: Tensor | float = 1.0) -> Tensor:
    """``Σ_g |g| π_g``, Eq. (17); with ``size`` = 1 the last term of Eq. (5).

    ``pi`` [G] are the gates' probabilities of being open, ``size`` [G] the weights behind each.
    """
    return (pi * size).sum()


def expected_l1(pi: Tensor, theta: Tensor) -> Tensor:
    """``Σ_j π_j |θ̃_j|``, Eq. (15); ``pi`` broadcasts against ``theta``."""
    return (pi * theta.abs()).sum()


def expected_l2(pi: Tensor, theta: Tensor) -> Tensor:
    """``Σ_j π_j θ̃_j²``, Eq. (16), and Eq. (18) where ``pi`` broadcasts over each group's weights."""
    return (pi * theta.square()).sum()


def add_decay(
    weight: Tensor,
    gated: Sequence[tuple[slice, int | None]],
    pi: tuple[Tensor, Tensor],
    factor: float,
    of_pi: Tensor,
    squares: Tensor,
) -> None:
    """Add the gradients of ``factor/2 E|θ|²`` of a weight: to ``of_pi`` [V], and to ``weight.grad``.

    ``gated`` says which of all gates multiply the weight along which of its dimensions, ``pi`` are their probabilities
    [V], and the same times the factor (and a loss's scale) for the weight's gradient. ``squares`` is memory like the
    weight.
    """
    torch.mul(weight, weight, out=squares)

    def beside(values: Tensor, span: slice, dim: int | None) -> Tensor:
        return values[span].to(weight.dtype).view(along(dim, weight))

    for side in gated:
        span, dim = side
        part = reduce(torch.mul, [beside(pi[0], *other) for other in gated if other is not side], squares)
        of_pi[span].add_(part.sum([d for d in range(weight.ndim) if d != dim]), alpha=0.5 * factor)
    if weight.requires_grad:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        first, *others = gated
        weight.grad.addcmul_(weight, reduce(torch.mul, [beside(pi[0], *o) for o in others], beside(pi[1], *first)))
