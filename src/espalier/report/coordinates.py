"""x coordinates of a layered drawing, after Brandes and Köpf (2001).

Vertices are aligned with their median neighbour into vertical blocks, four times (from above and below, from
the left and the right); each time blocks are packed by longest paths, and the mean of the two middle results
is taken. Long edges come out straight, and no two boxes of one layer overlap.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

_Pair = tuple[int, int]
_KINK = 16.0


def x_coordinates(
    order: Sequence[Sequence[int]],
    pairs: Sequence[_Pair],
    widths: Sequence[float],
    dummies_from: int,
    gap: float,
) -> list[float]:
    """The x of every vertex's centre.

    ``order``: vertices per layer from left to right; ``pairs``: edges between neighbouring layers, downwards;
    vertices from the number ``dummies_from`` on only carry long edges.

    >>> x_coordinates([[0], [1, 2]], [(0, 1), (0, 2)], [10, 10, 10], 3, gap=6)
    [8.0, 0.0, 16.0]
    """
    above: list[list[int]] = [[] for _ in widths]
    below: list[list[int]] = [[] for _ in widths]
    for u, v in pairs:
        below[u].append(v)
        above[v].append(u)
    conflicts = _conflicts(order, above, dummies_from)

    def room(u: int, v: int) -> float:
        tight = u >= dummies_from and v >= dummies_from
        return (widths[u] + widths[v]) / 2 + (gap / 3 if tight else gap)

    results: list[list[float]] = []
    for upwards in (False, True):
        rows = [list(layer) for layer in (reversed(order) if upwards else order)]
        for mirrored in (False, True):
            seen = [row[::-1] for row in rows] if mirrored else rows
            root = _align(seen, below if upwards else above, conflicts)
            xs = _pack(seen, root, room)
            results.append([-x for x in xs] if mirrored else xs)
    xs = _balance(results, widths)
    _snap(order, above, xs, room)
    return xs


def _conflicts(order: Sequence[Sequence[int]], above: Sequence[Sequence[int]], dummies_from: int) -> set[_Pair]:
    """Edges that cross a long edge's inner part: the long one is to stay straight."""
    found: set[_Pair] = set()
    for upper, lower in pairwise(order):
        position = {v: i for i, v in enumerate(upper)}
        left = start = 0
        for i, v in enumerate(lower):
            inner = next((u for u in above[v] if v >= dummies_from and u >= dummies_from), None)
            if inner is None and i < len(lower) - 1:
                continue
            right = len(upper) - 1 if inner is None else position[inner]
            for w in lower[start : i + 1]:
                for u in above[w]:
                    if not left <= position[u] <= right and not (u >= dummies_from and w >= dummies_from):
                        found.add((u, w))
            start, left = i + 1, right
    return found


def _align(rows: Sequence[Sequence[int]], neighbours: Sequence[Sequence[int]], conflicts: set[_Pair]) -> list[int]:
    """The root of every vertex's block: its topmost vertex."""
    root = list(range(len(neighbours)))
    aligned = [False] * len(neighbours)  # whether a vertex below already continues this one's block
    position = {v: i for row in rows for i, v in enumerate(row)}
    for row in rows:
        last = -1
        for v in row:
            near = sorted(neighbours[v], key=position.__getitem__)
            for middle in sorted({(len(near) - 1) // 2, len(near) // 2}) if near else ():
                u = near[middle]
                free = not aligned[u] and root[v] == v and last < position[u]
                if free and (u, v) not in conflicts and (v, u) not in conflicts:
                    root[v], aligned[u], last = root[u], True, position[u]
    return root


def _pack(rows: Sequence[Sequence[int]], root: Sequence[int], room: Callable[[int, int], float]) -> list[float]:
    """Blocks as far left as their neighbours let them, then right as far as nothing else is pushed."""
    right_of: dict[int, dict[int, float]] = {}
    left_of: dict[int, dict[int, float]] = {}
    for row in rows:
        for u, v in pairwise(row):
            a, b = root[u], root[v]
            space = max(room(u, v), right_of.get(a, {}).get(b, 0.0))
            right_of.setdefault(a, {})[b] = space
            left_of.setdefault(b, {})[a] = space
    blocks = _topological(sorted(set(root)), right_of, left_of)
    xs: dict[int, float] = {}
    for b in blocks:
        xs[b] = max((xs[a] + space for a, space in left_of.get(b, {}).items()), default=0.0)
    for a in reversed(blocks):
        if right_of.get(a):
            xs[a] = max(xs[a], min(xs[b] - space for b, space in right_of[a].items()))
    return [xs[r] for r in root]


def _topological(
    blocks: Sequence[int], right_of: dict[int, dict[int, float]], left_of: dict[int, dict[int, float]]
) -> list[int]:
    waiting = {b: len(left_of.get(b, {})) for b in blocks}
    ready = [b for b in blocks if not waiting[b]]
    for a in ready:  # grows while it is read
        for b in right_of.get(a, {}):
            waiting[b] -= 1
            if not waiting[b]:
                ready.append(b)
    return ready


def _balance(results: Sequence[list[float]], widths: Sequence[float]) -> list[float]:
    """Line all results up with the narrowest, then take the mean of the middle two."""

    def edges(xs: Sequence[float]) -> tuple[float, float]:
        spans = [(x - w / 2, x + w / 2) for x, w in zip(xs, widths, strict=True)]
        return min(s[0] for s in spans), max(s[1] for s in spans)

    extents = [edges(xs) for xs in results]
    left, right = min(extents, key=lambda e: e[1] - e[0])
    moved = []
    for i, (xs, extent) in enumerate(zip(results, extents, strict=True)):
        shift = right - extent[1] if i % 2 else left - extent[0]
        moved.append([x + shift for x in xs])
    return [sum(sorted(x)[1:3]) / 2 for x in zip(*moved, strict=True)]


def _snap(
    order: Sequence[Sequence[int]],
    above: Sequence[Sequence[int]],
    xs: list[float],
    room: Callable[[int, int], float],
) -> None:
    """Take small kinks out: a vertex moves below its middle predecessor where that is near and free."""
    for row in order[1:]:
        for i, v in enumerate(row):
            near = sorted(xs[u] for u in above[v])
            if not len(near) % 2:
                continue
            x = near[len(near) // 2]
            free_left = i == 0 or x - xs[row[i - 1]] >= room(row[i - 1], v)
            free_right = i == len(row) - 1 or xs[row[i + 1]] - x >= room(v, row[i + 1])
            if 0 < abs(x - xs[v]) <= _KINK and free_left and free_right:
                xs[v] = x
