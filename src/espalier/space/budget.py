"""What may stay."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from espalier.errors import BudgetError

Bound: TypeAlias = float | str
Share: TypeAlias = float | Mapping[str, float]
BOUNDS = ("structures", "params", "macs", "latency", "weights")

_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_NUMBER = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Zµ]*)\s*")


@dataclass(frozen=True)
class Budget:
    """Upper bounds on what stays; several hold together.

    >>> Budget(structures=0.5, params=0.6)
    Budget(structures=0.5, params=0.6)
    >>> Budget(macs="2G", latency="5ms", round_to=8)
    Budget(macs='2G', latency='5ms', round_to=8)

    ``structures`` bounds the number of removable structures, ``params`` the parameters, ``macs`` the
    multiply-accumulates per example and ``latency`` the time of one forward pass, measured on the device that the
    model lies on. ``weights`` bounds the single weights that are not zero, for methods that prune weights.
    A number up to 1 is a fraction of the full network, a larger one an amount; amounts may be written with a unit
    ("3.5M", "2G"), and latencies in absolute terms must be ("5ms", "800us").

    ``round_to``: the width of what is narrowed is a multiple of it, or as it was. ``min_keep`` and ``max_keep`` bound
    what a family (the filters of one layer, say) keeps, as a fraction or a number of its structures, either for
    all or by the families' names: ``{"layer4.*": 0.25}``. By default a family keeps a tenth, or where the budget
    cannot be met so, one structure.

    Raises :class:`BudgetError` for an empty budget, and for values that are no fraction or amount.
    """

    structures: Bound | None = None
    params: Bound | None = None
    macs: Bound | None = None
    latency: Bound | None = None
    weights: Bound | None = None
    round_to: int = 1
    min_keep: Share | None = None
    max_keep: Share = 1.0

    def __post_init__(self) -> None:
        if not self.given:
            names = "=, ".join(BOUNDS[:-1])
            raise BudgetError(f"an empty budget: give {names}= or {BOUNDS[-1]}=, the fraction or amount that may stay.")
        for name, value in self.given.items():
            _amount(name, value, 1.0)
        if self.round_to < 1:
            raise BudgetError(f"round_to={self.round_to}: at least 1.")
        for name in ("min_keep", "max_keep"):
            wish = getattr(self, name)
            for value in wish.values() if isinstance(wish, Mapping) else (wish,):
                if value is not None and not value >= 0.0:
                    raise BudgetError(f"{name}={value}: a fraction between 0 and 1, or a number of structures.")

    def __repr__(self) -> str:
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        said = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    @property
    def given(self) -> dict[str, Bound]:
        """The bounds that are set, by name."""
        return {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}

    @property
    def shapes_widths(self) -> bool:
        """Whether ``round_to``, ``min_keep`` or ``max_keep`` say what families keep."""
        return self.round_to != 1 or self.min_keep is not None or self.max_keep != 1.0

    def bounds(self, full: Mapping[str, float]) -> dict[str, float]:
        """The bounds as amounts, given the full network's.

        >>> Budget(params=0.5, macs="2k").bounds({"params": 300, "macs": 9000})
        {'params': 150.0, 'macs': 2000.0}
        """
        return {name: _amount(name, value, float(full[name])) for name, value in self.given.items()}

    def structures_to_remove(self, total: int) -> int:
        """The least number of structures to remove of so many (0 where their number is not bounded)."""
        if self.structures is None:
            return 0
        return max(0, total - int(_amount("structures", self.structures, float(total)) + 1e-9))

    def met_by(self, amounts: Mapping[str, float], full: Mapping[str, float]) -> bool:
        """Whether these amounts are within the budget, of a network with these full amounts."""
        return within(amounts, self.bounds({name: full.get(name, 0.0) for name in self.given}))

    def tightened(self, share: float, full: Mapping[str, float]) -> "Budget":
        """A budget in amounts, a ``share`` of the way (in logarithms) from the full amounts to this one."""
        bounds = self.bounds(full)
        amounts = {n: f"{full[n] * min(b / max(full[n], 1e-300), 1.0) ** share:.17g}" for n, b in bounds.items()}
        return replace(self, **{n: f"{a}s" if n == "latency" else a for n, a in amounts.items()})  # type: ignore[arg-type]

    def least(self, family: str, count: int, otherwise: float = 1.0) -> int:
        """How many structures of this family stay at least."""
        return max(1, min(_of(self.min_keep, family, count, otherwise, up=True), count))

    def most(self, family: str, count: int) -> int:
        """How many structures of this family stay at most."""
        return max(1, min(_of(self.max_keep, family, count, count, up=False), count))


def within(amounts: Mapping[str, float], bounds: Mapping[str, float]) -> bool:
    """Whether every amount that is bounded is at most its bound, up to rounding."""
    return all(amounts[name] <= bound * (1.0 + 1e-9) + 1e-12 for name, bound in bounds.items())


def _amount(name: str, value: Bound, full: float) -> float:
    """A bound as an amount: seconds, or a number of whatever is bounded."""
    units = _SECONDS if name == "latency" else _SCALE
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        if match is None or match[2] not in units:
            raise BudgetError(f"{name}={value!r}: a number and one of the units {', '.join(filter(None, units))}.")
        return float(match[1]) * units[match[2]]
    if not value >= 0.0 or (value > 1.0 and not float(value).is_integer()):
        raise BudgetError(
            f"{name}={value}: the fraction that may stay lies between 0 and 1; an amount is a whole number above 1."
        )
    if value <= 1.0:
        return value * full
    if name == "latency":
        raise BudgetError(f"latency={value}: write an amount with its unit, '{value:g}ms' say.")
    return float(value)


def _of(wish: Share | None, family: str, count: int, otherwise: float, *, up: bool) -> int:
    if isinstance(wish, Mapping):
        wish = next((share for pattern, share in wish.items() if fnmatchcase(family, pattern)), None)
    if wish is None:
        wish = otherwise
    if wish > 1 or isinstance(wish, int):
        return int(wish)
    return -int(-wish * count // 1) if up else int(wish * count + 1e-9)
