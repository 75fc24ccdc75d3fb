"""The knapsack of a budget: which widths and segments keep the most saliency within bounds on amounts.

Keep widths w (per family, its best structures first) and segments so that the sum of kept scores is largest while every
bounded amount is at most its bound. Values are concave in each width; amounts are polynomials in the widths. Small
instances are enumerated. In others the step with the least loss per amount saved is taken until the bounds hold, then
what fits is given back, and then pairs of steps are exchanged while that gains anything.
"""

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from espalier.space.amounts import Amounts
from espalier.space.structure import Family
from espalier.space.widths import Widths

ENUMERATED = 20_000  # combinations of widths and segments that are all looked at
COARSE = 32  # the descent takes a family down in so many steps
PAIRS = 48  # families on either side of an exchange
EXCHANGES = 200


@dataclass
class Choice:
    """``kept`` structures of every family, the families whose ``segments`` go, and the sum of scores that stays."""

    kept: np.ndarray
    segments: tuple[int, ...] = ()
    value: float = 0.0


@dataclass
class Knapsack:
    """``valid(segment families)`` and ``live(segment families)`` look at the graph; ``segments`` may go."""

    families: Sequence[Family]
    widths: Widths
    amounts: Amounts
    bounds: Mapping[str, float]
    segments: Sequence[int]
    valid: Callable[[Sequence[int]], bool]
    live: Callable[[Sequence[int]], set[int]]
    worth: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.columns = [self.amounts.kinds.index(name) for name in self.bounds]
        self.limits = np.array(list(self.bounds.values()))

    # Amounts.

    def coefficients(self, segments: Sequence[int]) -> np.ndarray:
        """[terms, bounds] of what is live without these segments."""
        return self.amounts.counted(self.live(segments) if self.segments else None)[:, self.columns]

    def used(self, kept: np.ndarray, segments: Sequence[int], coefficients: np.ndarray) -> np.ndarray:
        """[..., bounds]: the bounded amounts of any numbers kept."""
        return self.amounts.total(self._removed(kept, segments), coefficients)

    def fits(self, used: np.ndarray) -> np.ndarray:
        """[...]: whether amounts are within all bounds."""
        return np.asarray((used <= self.limits * (1 + 1e-9) + 1e-12).all(-1))

    def _removed(self, kept: np.ndarray, segments: Sequence[int]) -> np.ndarray:
        removed = (self.widths.full - kept).astype(np.float64)
        removed[..., list(segments)] = 1.0
        return removed

    def value(self, kept: np.ndarray, segments: Sequence[int]) -> np.ndarray:
        """[...]: the sum of the scores that stay."""
        values = self.widths.values(kept)
        values[..., list(segments)] = 0.0
        return values.sum(-1)

    # Solutions.

    def solve(self) -> Choice | None:
        """The best that is found; None if nothing fits."""
        return self.enumerate() if self.combinations() <= ENUMERATED else self.search()

    def combinations(self) -> float:
        """How many combinations of permitted widths and segments there are."""
        if len(self.segments) > 8:
            return float("inf")
        counts = [len(self.widths.permitted(k)) for k in range(len(self.families))]
        return float(np.prod(np.array(counts, dtype=np.float64))) * 2 ** len(self.segments)

    def enumerate(self) -> Choice | None:
        """Look at every combination."""
        sizes = [
            self.widths.permitted(k) if f.level != "segment" else np.ones(1, int) for k, f in enumerate(self.families)
        ]
        grid = np.stack([g.ravel() for g in np.meshgrid(*sizes, indexing="ij")], axis=-1)
        best: Choice | None = None
        for n in range(len(self.segments) + 1):
            for segments in itertools.combinations(self.segments, n):
                if not self.valid(segments):
                    continue
                fitting = grid[self.fits(self.used(grid, segments, self.coefficients(segments)))]
                if len(fitting):
                    values = self.value(fitting, segments)
                    at = int(values.argmax())
                    if best is None or values[at] > best.value:
                        best = Choice(fitting[at], segments, float(values[at]))
        return best

    def search(self) -> Choice | None:
        """Down by the least loss per amount saved, back up where there is room, then exchanges."""
        found = self._descend()
        if found is None:
            return None
        kept, segments = found
        segments = self._without_needless(kept, segments)
        coefficients = self.coefficients(segments)
        kept = self._exchange(self._give_back(kept, segments, coefficients), segments, coefficients)
        return Choice(kept, tuple(segments), float(self.value(kept, segments)))

    def _descend(self) -> tuple[np.ndarray, list[int]] | None:
        widths, kept, segments = self.widths, self.widths.start.copy(), []
        step = np.maximum(widths.full // COARSE, 1)
        coefficients = self.coefficients(segments)
        offers = _Offers(self)
        while True:
            used = self.used(kept, segments, coefficients)
            over = used > self.limits * (1 + 1e-9) + 1e-12
            if not over.any():
                return kept, segments
            weight = np.where(over, 1.0 / np.maximum(self.limits, 1e-300), 0.0)
            down = widths.lower(kept, step)
            saved = (kept - down) * self.amounts.slope(self._removed(kept, segments), coefficients @ weight)
            lost = widths.values(kept) - widths.values(down)
            price = np.where(saved > 0, lost / np.maximum(saved, 1e-300), np.inf)
            best = int(price.argmin())
            segment = offers.below(float(price[best]), kept, segments, weight)
            if segment is not None:
                segments.append(segment)
                coefficients = self.coefficients(segments)
            elif price[best] < np.inf:
                kept[best] = down[best]
            else:
                return None

    def _without_needless(self, kept: np.ndarray, segments: list[int]) -> list[int]:
        """Segments come back where there is room for them, the most worthy first."""
        for segment in sorted(segments, key=lambda k: -self.worth[k]):
            left = [k for k in segments if k != segment]
            if self.valid(left) and self.fits(self.used(kept, left, self.coefficients(left))):
                segments = left
        return segments

    def _give_back(self, kept: np.ndarray, segments: Sequence[int], coefficients: np.ndarray) -> np.ndarray:
        widths = self.widths
        step = np.maximum(widths.full // COARSE, 1)
        while True:
            up = widths.higher(kept, step)
            rows = np.flatnonzero(up > kept)
            trials = _each(kept, rows, up)
            used = self.used(trials, segments, coefficients)
            good = self.fits(used)
            if good.any():
                now = self.used(kept, segments, coefficients)
                gained = widths.values(up)[rows] - widths.values(kept)[rows]
                spent = ((used - now) / np.maximum(self.limits, 1e-300)).max(-1)
                rate = np.where(good, gained / np.maximum(spent, 1e-12), -np.inf)
                kept = trials[int(rate.argmax())]
            elif (step <= 1).all():
                return kept
            else:
                step = np.maximum(step // 2, 1)

    def _exchange(self, kept: np.ndarray, segments: Sequence[int], coefficients: np.ndarray) -> np.ndarray:
        """One step down in one family for a step up in another, while the scores that stay grow."""
        widths = self.widths
        for _ in range(EXCHANGES):
            down, up = widths.lower(kept), widths.higher(kept)
            values = widths.values(kept)
            lost, gained = values - widths.values(down), widths.values(up) - values
            givers, takers = np.flatnonzero(down < kept), np.flatnonzero(up > kept)
            givers = givers[np.argsort(lost[givers], kind="stable")[:PAIRS]]
            takers = takers[np.argsort(-gained[takers], kind="stable")[:PAIRS]]
            a, b = (g.ravel() for g in np.meshgrid(givers, takers, indexing="ij"))
            better = (gained[b] > lost[a] * (1 + 1e-9)) & (a != b)
            a, b = a[better], b[better]
            trials = np.repeat(kept[None], len(a), axis=0)
            trials[np.arange(len(a)), a] = down[a]
            trials[np.arange(len(a)), b] = up[b]
            good = self.fits(self.used(trials, segments, coefficients)) if len(a) else np.zeros(0, bool)
            if not good.any():
                return kept
            gain = np.where(good, gained[b] - lost[a], -np.inf)
            kept = self._give_back(trials[int(gain.argmax())], segments, coefficients)
        return kept


class _Offers:
    """Segments by loss per amount saved; a price is looked at anew when it is the lowest (they only rise)."""

    def __init__(self, problem: Knapsack):
        self.problem = problem
        self.heap = [(0.0, -1, k) for k in problem.segments]  # price, when it was made, family
        heapq.heapify(self.heap)

    def below(self, price: float, kept: np.ndarray, segments: list[int], weight: np.ndarray) -> int | None:
        """The segment whose removal is valid and costs the least, at most ``price``."""
        now, blocked, tried = len(segments), [], set[int]()
        found = None
        while self.heap and self.heap[0][0] <= price:
            known, _, k = heapq.heappop(self.heap)
            if k in tried:
                found = k if known < np.inf else None
                break
            tried.add(k)
            if not self.problem.valid([*segments, k]):
                blocked.append((known, now, k))
                continue
            heapq.heappush(self.heap, (self._price(k, kept, segments, weight), now, k))
        for offer in blocked:  # what follows may go, and then it may
            heapq.heappush(self.heap, offer)
        return found

    def _price(self, k: int, kept: np.ndarray, segments: list[int], weight: np.ndarray) -> float:
        problem = self.problem
        before = problem.used(kept, segments, problem.coefficients(segments))
        after = problem.used(kept, [*segments, k], problem.coefficients([*segments, k]))
        saved = float((before - after) @ weight)
        return problem.worth[k] / saved if saved > 0 else float("inf")


def _each(kept: np.ndarray, rows: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """One copy of ``kept`` per row, with that family changed."""
    trials = np.repeat(kept[None], len(rows), axis=0)
    trials[np.arange(len(rows)), rows] = changed[rows]
    return trials
