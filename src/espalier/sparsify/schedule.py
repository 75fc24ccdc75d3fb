"""Step sizes and momenta of ProxSGD over time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PowerDecay:
    """``ε(t) = ε / (1 + t/offset)^step`` and ``ρ(t) = ρ / (1 + t/offset)^momentum``, t = 0, 1, ….

    >>> PowerDecay(step=0.9, momentum=0.6).factors(0)
    (1.0, 1.0)

    With ``1/2 < momentum < step <= 1`` the conditions of Theorem 1 of ProxSGD (Yang et al., 2020) hold: both
    in (0, 1], sums infinite, sums of squares finite, ε(t)/ρ(t) → 0. Other exponents raise ValueError;
    constants, as GSparsity uses them, do not meet the theorem and are the optimizer's default.
    """

    step: float = 0.9
    momentum: float = 0.6
    offset: float = 1000.0

    def __post_init__(self) -> None:
        if not 0.5 < self.momentum < self.step <= 1.0 or self.offset <= 0.0:
            raise ValueError(
                f"step={self.step}, momentum={self.momentum}: Theorem 1 of ProxSGD needs 1/2 < momentum < step <= 1."
            )

    def factors(self, t: int) -> tuple[float, float]:
        """What ε and ρ are multiplied by at step t."""
        base = 1.0 + t / self.offset
        return base**-self.step, base**-self.momentum
