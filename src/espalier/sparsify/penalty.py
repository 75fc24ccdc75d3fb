"""Expected norms of gated parameters ``θ = θ̃ z`` with ``z ~ Ber(π)`` (Eqs. 15 to 18 of L0-ARM).

Exact for binary gates. For hard concrete gates, which lie between 0 and 1, π = P(z ≠ 0) gives ``E|θ|₀`` exactly, but
``E|θ|`` and ``E|θ|²`` only from above, as Louizos et al. (2018) use them: E z² <= E z <= P(z ≠ 0).
"""

from torch import Tensor


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
