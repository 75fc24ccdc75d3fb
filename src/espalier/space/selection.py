"""From a score per structure to the structures that go: solved under a budget, and checked on what is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from espalier.errors import BudgetError, SpaceError
from espalier.space.budget import Budget, within
from espalier.space.gauge import Gauge
from espalier.space.knapsack import Choice, Knapsack
from espalier.space.ranking import RANKINGS, ranked
from espalier.space.widths import Widths

if TYPE_CHECKING:
    from espalier.space.search_space import SearchSpace

USUAL_FLOOR = 0.1  # of a family, where min_keep is not given and the budget allows it
ROUNDS = 8
CLOSE = 0.01


@dataclass(frozen=True)
class Selection:
    """``removed`` structures in ascending score, and the amounts that stay, by name, as measured."""

    removed: list[str]
    amounts: Mapping[str, float]


def select(space: "SearchSpace", scores: Tensor, budget: Budget, ranking: str = "global") -> Selection:
    """Remove what has little saliency for what it costs, so that ``budget`` holds.

    >>> import torch
    >>> from espalier import Budget, search_space
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> space = search_space(model, torch.rand(2, 3), levels=("channel",))
    >>> select(space, torch.tensor([4.0, 1.0, 3.0, 2.0]), Budget(params=0.6)).removed
    ['0[1]', '0[3]']

    ``scores`` [structures]: higher is kept. ``ranking`` "global": the sum of the scores that stay is as large as can be
    found; scores are compared across the network. "local": every family keeps the same fraction, its best.
    "isomorphic": families of the same shape share their fraction, and scores are compared among them. Segments only go
    under "global".

    What is chosen is built, and its parameters and MACs counted and its latency measured; where that differs
    from what was predicted, the choice is made again. Raises :class:`BudgetError`, naming the nearest, where the budget
    cannot be met, and :class:`SpaceError` for scores that are not finite or of another number.
    """
    if ranking not in RANKINGS:
        raise SpaceError(f"no ranking is called '{ranking}': there are {', '.join(RANKINGS)}.")
    values = _checked(space, scores)
    asked = _Asked(space, budget, values)
    best: tuple[Choice, Widths, dict[str, float]] | None = None
    targets = asked.targets
    for _ in range(ROUNDS if asked.bounds else 0):
        choice, widths = _solved(space, values, budget, asked, targets, ranking)
        if choice is None:
            break
        names = _names(space, choice, widths, values)
        expected, real = asked.predicted(choice, widths), asked.measured(names)
        if within(real, asked.bounds) and (best is None or choice.value > best[0].value):
            best = choice, widths, real
        again = asked.corrected(targets, expected, real)
        if again == targets:
            break
        targets = again
    choice, widths, real = best or asked.smallest()
    return Selection(_names(space, choice, widths, values), real)


class _Asked(Gauge):
    """A budget, and the targets for the prediction under which it holds."""

    def __init__(self, space: "SearchSpace", budget: Budget, scores: np.ndarray):
        super().__init__(space, budget)
        self.targets = dict(self.bounds)
        self.scores = scores
        self.slope = dict.fromkeys(self.bounds, 1.0)
        self.brackets = dict.fromkeys(self.bounds, (-np.inf, np.inf))
        if "latency" in self.bounds:
            self._calibrate()

    def smallest(self) -> tuple[Choice, Widths, dict[str, float]]:
        """As little as can stay, if that is within the budget; else :class:`BudgetError`, naming it as the least."""
        choice, widths = self._smallest()
        real = self.measured(_names(self.space, choice, widths, self.scores))
        if within(real, self.bounds):
            return choice, widths, real
        raise BudgetError(
            f"{self.budget} cannot be met by the {len(self.space)} structures of this space: "
            f"the least is {self.shares(real)}."
        )

    def _calibrate(self) -> None:
        """A line through what is predicted and what is measured, for the full and for the smallest network."""
        choice, widths = self._smallest()
        expected, full = self.predicted(choice, widths)["latency"], self.full["latency"]
        real = self.measured(_names(self.space, choice, widths, self.scores))["latency"]
        self.slope["latency"] = (full - expected) / max(full - real, 1e-3 * full)
        self.targets["latency"] = expected + (self.bounds["latency"] - real) * self.slope["latency"]

    def _smallest(self) -> tuple[Choice, Widths]:
        """As little as valid removals leave, taking segments in their order."""
        space = self.space
        widths = Widths(space.families, self.scores, self.budget, 0.0)
        gone: list[int] = []
        for k, family in enumerate(space.families):
            if family.level == "segment":
                names = {s: space.families[i].name for i in [*gone, k] for s in space.families[i].segments}
                gone += [] if space.validity.explain(names) else [k]
        return Choice(widths.at_most(np.zeros_like(widths.full)), tuple(gone)), widths

    def predicted(self, choice: Choice, widths: Widths) -> dict[str, float]:
        removed = (widths.full - choice.kept).astype(np.float64)
        removed[list(choice.segments)] = 1.0
        live = self.space.validity.live({s for k in choice.segments for s in self.space.families[k].segments})
        return dict(zip(self.table.kinds, self.table(removed, live).tolist(), strict=True))

    def corrected(
        self, targets: Mapping[str, float], expected: Mapping[str, float], real: Mapping[str, float]
    ) -> dict[str, float]:
        """Targets for the prediction, so that the real amounts come out at the bounds: a line, kept in brackets."""
        found = dict(targets)
        for name, bound in self.bounds.items():
            slack = CLOSE if name != "latency" else 3 * CLOSE  # a measured time is not more exact than that
            off = abs(real[name] - expected[name]) > 1e-6 * self.full[name]
            held = len(self.bounds) == 1 or expected[name] > 0.9 * targets[name]  # the prediction held it back
            low, high = self.brackets[name]
            if real[name] > bound * (1 + 1e-9):
                high = min(high, targets[name])
            elif off and held and real[name] < (1 - slack) * bound:
                low = max(low, targets[name])
            else:
                continue
            self.brackets[name] = low, high
            aim = bound if name != "latency" else bound * (1 - CLOSE)
            line = min(expected[name], targets[name]) - (real[name] - aim) * self.slope[name]
            margin = 0.1 * (high - low)
            found[name] = min(max(line, low + margin), high - margin) if np.isfinite(margin) else line
        return found


def _solved(
    space: "SearchSpace", values: np.ndarray, budget: Budget, asked: _Asked, targets: Mapping[str, float], ranking: str
) -> tuple[Choice | None, Widths]:
    """With the usual floor where the budget can be met so, else with one structure per family."""
    choice, widths = None, Widths(space.families, values, budget, USUAL_FLOOR)
    for floor in (USUAL_FLOOR, 0.0):
        widths = Widths(space.families, values, budget, floor)
        problem = _knapsack(space, values, widths, asked, targets)
        choice = problem.solve() if ranking == "global" else ranked(problem, values, ranking)
        if choice is not None:
            break
    return choice, widths


def _knapsack(
    space: "SearchSpace", values: np.ndarray, widths: Widths, asked: _Asked, targets: Mapping[str, float]
) -> Knapsack:
    segments = [k for k, f in enumerate(space.families) if f.level == "segment"]

    def gone(chosen: Sequence[int]) -> dict[int, str]:
        return {s: space.families[k].name for k in chosen for s in space.families[k].segments}

    return Knapsack(
        space.families, widths, asked.table, targets, segments,
        valid=lambda chosen: not space.validity.explain(gone(chosen)),
        live=lambda chosen: space.validity.live(gone(chosen)),
        worth={k: float(values[space.structures.offsets[k]]) for k in segments},
    )  # fmt: skip


def _names(space: "SearchSpace", choice: Choice, widths: Widths, values: np.ndarray) -> list[str]:
    """What goes, in ascending score."""
    gone = [widths.order[k][kept:] + space.structures.offsets[k] for k, kept in enumerate(choice.kept)]
    gone += [np.array([space.structures.offsets[k]]) for k in choice.segments]
    positions = np.concatenate(gone) if gone else np.zeros(0, int)
    positions = positions[np.argsort(values[positions], kind="stable")]
    return [space.structures[int(i)].name for i in positions]


def _checked(space: "SearchSpace", scores: Tensor) -> np.ndarray:
    values = scores.detach().double().cpu().numpy().reshape(-1)
    if len(values) != len(space):
        raise SpaceError(f"{len(values)} scores for {len(space)} structures.")
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise SpaceError(f"the score of '{space.structures[at].name}' is {values[at]}: scores are finite numbers.")
    return values - min(values.min(initial=0.0), 0.0)
