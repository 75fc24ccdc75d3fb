"""The functions g that turn a gate's parameter φ into its probability π = g(φ) (section 3.1 of L0-ARM)."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from espalier.errors import TrainingError


class Probability(Protocol):
    """Antithetic: ``g(-φ) = 1 - g(φ)``. ``k`` is the slope's factor."""

    @property
    def k(self) -> float: ...

    def __call__(self, phi: Tensor) -> Tensor: ...

    def inverse(self, pi: Tensor) -> Tensor:
        """The φ with ``g(φ) = π``."""
        ...

    def logit_slope(self, phi: Tensor) -> Tensor:
        """``dψ/dφ = g'(φ) / (g(φ) (1 - g(φ)))`` where ψ = logit(π); 0 where g is flat."""
        ...


@dataclass(frozen=True)
class Sigmoid:
    """``g(φ) = σ(k φ)``, Eq. (11); k = 1 is the plain sigmoid of Theorem 1.

    >>> g = Sigmoid(k=7.0)
    >>> g(torch.zeros(2)).tolist(), g.logit_slope(torch.ones(1)).item()
    ([0.5, 0.5], 7.0)
    """

    k: float = 7.0

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(self, phi: Tensor) -> Tensor:
        return torch.sigmoid(self.k * phi)

    def inverse(self, pi: Tensor) -> Tensor:
        return torch.logit(pi) / self.k

    def logit_slope(self, phi: Tensor) -> Tensor:
        return torch.full_like(phi, self.k)


@dataclass(frozen=True)
class HardSigmoid:
    """``g(φ) = min(1, max(0, k φ / 7 + 1/2))``, Eq. (12).

    >>> HardSigmoid()(torch.tensor([-1.0, 0.0, 0.25, 1.0])).tolist()
    [0.0, 0.5, 0.75, 1.0]
    """

    k: float = 7.0

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(self, phi: Tensor) -> Tensor:
        return (phi * (self.k / 7.0) + 0.5).clamp(0.0, 1.0)

    def inverse(self, pi: Tensor) -> Tensor:
        return (pi - 0.5) * (7.0 / self.k)

    def logit_slope(self, phi: Tensor) -> Tensor:
        pi = self(phi)
        inside = (pi > 0.0) & (pi < 1.0)
        variance = torch.where(inside, pi * (1.0 - pi), 1.0)
        return torch.where(inside, (self.k / 7.0) / variance, 0.0)


def _check_k(k: float) -> None:
    if not 0.0 < k < math.inf:
        raise TrainingError(f"k, the slope of g, is above 0 and finite, not {k}.")


def draw_phi(g: Probability, pi: Tensor, generator: torch.Generator | None = None, spread: float = 0.01) -> Tensor:
    """Initial parameters around ``g(φ) = π``, as the authors' code draws them: ``φ ~ N(g⁻¹(π), (spread /
    k)²)``.
    """
    noise = torch.randn(pi.shape, generator=generator, dtype=pi.dtype)
    return g.inverse(pi) + noise * (spread / g.k)


def logit(p: float) -> float:
    """``log(p / (1 - p))``."""
    return math.log(p / (1.0 - p))
