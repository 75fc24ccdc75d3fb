"""Which indices go together: a vectorised union of index labels.

Every index of every axis that may become narrower carries an atom, a number. Atoms that must go together are
joined; atoms that must stay are fixed, with the reason. A :class:`Link` stands for an operator that cuts an axis
into several or merges several into one, where only one of the several can be narrowed freely.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Link:
    """An element of an operator's result lies at one index of each of ``outer`` and comes from one of each ``inner``.

    ``pairs[i, o]`` are the atoms (of inner axis i, of outer axis o) that share an element. Only one inner and one
    outer axis that are related can be narrowed: :meth:`Atoms.solve` chooses.
    """

    inner: Sequence[Ids]
    outer: Sequence[Ids]
    pairs: Mapping[tuple[int, int], tuple[Ids, Ids]]
    reason: str


class Atoms:
    """Collects equations on atoms; :meth:`solve` returns what goes together and what must stay."""

    def __init__(self) -> None:
        self.count = 0
        self.reasons: list[str] = []
        self._pairs: list[tuple[Ids, Ids]] = []
        self._fixed: list[tuple[Ids, int]] = []
        self._preferred: list[Ids] = []
        self._links: list[Link] = []

    def fresh(self, size: int) -> Ids:
        """Atoms that nothing is known of yet."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def join(self, a: Ids, b: Ids) -> None:
        """Index by index, these go together."""
        if a is not b:
            self._pairs.append((a, b))

    def fix(self, atoms: Ids, reason: str) -> None:
        """These stay."""
        if not self.reasons or self.reasons[-1] != reason:
            self.reasons.append(reason)
        self._fixed.append((atoms, len(self.reasons) - 1))

    def prefer(self, atoms: Ids) -> None:
        """Where a link leaves a choice, these are narrowed (the heads of attention)."""
        self._preferred.append(atoms)

    def link(self, link: Link) -> None:
        self._links.append(link)

    def solve(self) -> "Solved":
        """Join, fix, and settle every link: forced ones first, then by preference, then the larger axis."""
        state = Solved(self)
        state.absorb(self._pairs, self._fixed)
        preferred = np.zeros(self.count, dtype=bool)
        for atoms in self._preferred:
            preferred[atoms] = True
        pending = self._links
        while pending:
            waiting = [link for link in pending if not state.settle(link)]
            if len(waiting) == len(pending):
                best = max(waiting, key=lambda link: state.urgency(link, preferred))
                state.choose(best, preferred)
            pending = waiting
            state.flush(preferred)
        return state


class Solved:
    """``root[atom]`` is equal for atoms that go together; ``reason[atom]`` is -1 for what may go."""

    def __init__(self, atoms: Atoms):
        self.root: Ids = np.arange(atoms.count)
        self._atoms = atoms
        self._reason: Ids = np.full(atoms.count, -1)  # by root
        self._pairs: list[tuple[Ids, Ids]] = []
        self._fixed: list[tuple[Ids, int]] = []

    @property
    def reason(self) -> Ids:
        return self._reason[self.root]

    def absorb(self, pairs: Sequence[tuple[Ids, Ids]], fixed: Sequence[tuple[Ids, int]]) -> None:
        if pairs:
            a = np.concatenate([p[0] for p in pairs])
            b = np.concatenate([p[1] for p in pairs])
            top = components(len(self.root), self.root[a], self.root[b])
            self.root = top[self.root]
            held = np.flatnonzero(self._reason >= 0)
            np.maximum.at(self._reason, self.root[held], self._reason[held])
        for ids, reason in fixed:
            roots = self.root[ids]
            self._reason[roots] = np.where(self._reason[roots] < 0, reason, self._reason[roots])

    def flush(self, preferred: npt.NDArray[np.bool_]) -> None:
        """Take over what settled links have decided."""
        self.absorb(self._pairs, self._fixed)
        self._pairs, self._fixed = [], []
        marked = np.zeros_like(preferred)
        marked[self.root[preferred]] = True
        preferred |= marked[self.root]

    def free(self, axis: Ids) -> bool:
        return bool((self._reason[self.root[axis]] < 0).any())

    def _open(self, link: Link) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        inner = [i for i, axis in enumerate(link.inner) if self.free(axis)]
        outer = [o for o, axis in enumerate(link.outer) if self.free(axis)]
        return inner, outer, [(i, o) for i, o in link.pairs if i in inner and o in outer]

    def settle(self, link: Link) -> bool:
        """Settle a link that leaves no choice; whether it did."""
        inner, outer, related = self._open(link)
        if len({i for i, _ in related}) < len(related) or len({o for _, o in related}) < len(related):
            return False
        for i in set(inner) - {i for i, _ in related}:
            self._fix(link.inner[i], link.reason)
        for o in set(outer) - {o for _, o in related}:
            self._fix(link.outer[o], link.reason)
        self._pairs += [link.pairs[key] for key in related]
        return True

    def urgency(self, link: Link, preferred: npt.NDArray[np.bool_]) -> int:
        return int(any(preferred[axis].any() for axis in (*link.inner, *link.outer)))

    def choose(self, link: Link, preferred: npt.NDArray[np.bool_]) -> None:
        """Of several axes related to one, keep the preferred (else the largest) and fix the others."""
        _, _, related = self._open(link)

        def rank(axis: Ids) -> tuple[bool, int]:
            return bool(preferred[axis].any()), len(axis)

        i, o = max(related, key=lambda pair: (rank(link.inner[pair[0]]), rank(link.outer[pair[1]])))
        for a, b in related:
            if a != i and b == o:
                self._fix(link.inner[a], link.reason)
            if b != o and a == i:
                self._fix(link.outer[b], link.reason)
        for axis in (link.inner[i], link.outer[o]):
            preferred[axis] = True

    def _fix(self, axis: Ids, reason: str) -> None:
        self._atoms.reasons.append(reason)
        self._fixed.append((axis, len(self._atoms.reasons) - 1))


def components(count: int, a: Ids, b: Ids) -> Ids:
    """The least member of every element's connected component, for the edges (a, b)."""
    top = np.arange(count)
    while True:
        left, right = top[a], top[b]
        apart = left != right
        if not apart.any():
            return top
        a, b, left, right = a[apart], b[apart], left[apart], right[apart]
        low = np.minimum(left, right)
        np.minimum.at(top, np.maximum(left, right), low)
        while not np.array_equal(top, shorter := top[top]):
            top = shorter
