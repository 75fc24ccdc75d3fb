"""The hard concrete gate of L0-HC (Louizos, Welling & Kingma, 2018): differentiable, but biased for binary
gates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HardConcrete:
    """``z = clip(s (ζ - γ) + γ, 0, 1)`` with ``s = σ((logit u + log α) / β)``; the gate's parameter φ is log
    α.

    >>> gate = HardConcrete()
    >>> gate.expected(torch.tensor([-3.0, 0.0, 3.0])).tolist()
    [0.0, 0.5, 1.0]
    """

    beta: float = 2.0 / 3.0
    gamma: float = -0.1
    zeta: float = 1.1
    smallest: float = math.log(1e-2)
    largest: float = math.log(1e2)

    def sample(self, log_alpha: Tensor, u: Tensor) -> Tensor:
        """Gates in [0, 1] for uniform noise u; differentiable in ``log_alpha``."""
        u = u.clamp(1e-6, 1.0 - 1e-6)
        return self._stretch(torch.sigmoid((torch.logit(u) + log_alpha) / self.beta))

    def expected(self, log_alpha: Tensor) -> Tensor:
        """The gate used after training; exactly 0 where ``σ(log α) <= -γ / (ζ - γ)``."""
        return self._stretch(torch.sigmoid(log_alpha))

    def open_probability(self, log_alpha: Tensor) -> Tensor:
        """``P(z != 0) = σ(log α - β log(-γ / ζ))``."""
        return torch.sigmoid(log_alpha - self.beta * math.log(-self.gamma / self.zeta))

    def clamp_(self, log_alpha: Tensor) -> None:
        """Keep log α within [ln 0.01, ln 100], as the authors do, so that no gate is lost for good."""
        log_alpha.clamp_(self.smallest, self.largest)

    def _stretch(self, s: Tensor) -> Tensor:
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0.0, 1.0)
