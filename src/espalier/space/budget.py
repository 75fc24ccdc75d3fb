"""What may stay."""

from dataclasses import dataclass

from espalier.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """Upper bounds on what stays, as fractions of the full network; several hold together.

    ``structures`` bounds the number of removable structures, ``params`` the parameters and ``macs`` the
    multiply-accumulates of the constructed sub-network.

    >>> Budget(structures=0.5, params=0.6)
    Budget(structures=0.5, params=0.6, macs=None)
    """

    structures: float | None = None
    params: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("structures", "params", "macs")}
        if all(value is None for value in given.values()):
            raise BudgetError("an empty budget: give structures=, params= or macs=, the fraction that may stay.")
        for name, value in given.items():
            if value is not None and not 0.0 <= value <= 1.0:
                raise BudgetError(f"{name}={value}: the fraction that may stay lies between 0 and 1.")

    def structures_to_remove(self, total: int) -> int:
        """The least number of structures to remove (0 where only parameters or MACs are bounded)."""
        return 0 if self.structures is None else total - int(self.structures * total + 1e-9)

    def met_by(self, params: float, macs: float) -> bool:
        """Whether fractions of parameters and MACs are within the budget."""
        return (self.params is None or params <= self.params) and (self.macs is None or macs <= self.macs)
