"""The order of vertices within the layers of a drawing: few crossings."""

from bisect import bisect_right, insort
from collections.abc import Sequence
from itertools import pairwise

_SWEEPS = 24
_PATIENCE = 4


def order_layers(layers: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Order each layer by sweeps of barycentres and swaps of neighbours; the best order found is returned.

    ``pairs`` are edges between neighbouring layers, from the upper to the lower one.

    >>> order_layers([[0, 1], [2, 3]], [(0, 3), (1, 2)])
    [[0, 1], [3, 2]]
    """
    above: dict[int, list[int]] = {v: [] for layer in layers for v in layer}
    below: dict[int, list[int]] = {v: [] for layer in layers for v in layer}
    for u, v in pairs:
        below[u].append(v)
        above[v].append(u)
    order = _depth_first(layers, below)
    best, fewest, stale = [list(layer) for layer in order], _crossings(order, below), 0
    for sweep in range(_SWEEPS):
        if not fewest or stale == _PATIENCE:
            break
        downwards = sweep % 2 == 0
        rows = range(1, len(order)) if downwards else range(len(order) - 2, -1, -1)
        for row in rows:
            fixed = order[row - 1] if downwards else order[row + 1]
            _by_barycentre(order[row], above if downwards else below, fixed, right_first=sweep % 4 >= 2)
        _swap_neighbours(order, above, below)
        crossings = _crossings(order, below)
        stale += 1
        if crossings < fewest:
            best, fewest, stale = [list(layer) for layer in order], crossings, 0
    return best


def _depth_first(layers: Sequence[Sequence[int]], below: dict[int, list[int]]) -> list[list[int]]:
    row_of = {v: r for r, layer in enumerate(layers) for v in layer}
    order: list[list[int]] = [[] for _ in layers]
    seen: set[int] = set()
    for start in (v for layer in layers for v in layer):
        stack = [start]
        while stack:
            v = stack.pop()
            if v not in seen:
                seen.add(v)
                order[row_of[v]].append(v)
                stack += reversed(below[v])
    return order


def _by_barycentre(layer: list[int], neighbours: dict[int, list[int]], fixed: Sequence[int], right_first: bool) -> None:
    """Sort ``layer`` by the mean position of neighbours; vertices without neighbours keep their places."""
    position = {v: i for i, v in enumerate(fixed)}
    mean = {v: sum(position[u] for u in neighbours[v]) / len(neighbours[v]) for v in layer if neighbours[v]}
    movable = [v for v in layer if v in mean]
    if right_first:
        movable.reverse()
    movable.sort(key=mean.__getitem__)
    places = iter(movable)
    layer[:] = [next(places) if v in mean else v for v in layer]


def _swap_neighbours(order: list[list[int]], above: dict[int, list[int]], below: dict[int, list[int]]) -> None:
    """One pass over all neighbours in a layer: swap two where that takes crossings away."""
    position = {v: i for layer in order for i, v in enumerate(layer)}
    up = {v: sorted(position[u] for u in above[v]) for layer in order for v in layer}
    down = {v: sorted(position[u] for u in below[v]) for layer in order for v in layer}
    for row, layer in enumerate(order):
        moved = False
        for i in range(len(layer) - 1):
            u, v = layer[i], layer[i + 1]
            gain = _between(up[u], up[v]) - _between(up[v], up[u])
            gain += _between(down[u], down[v]) - _between(down[v], down[u])
            if gain > 0:
                layer[i], layer[i + 1] = v, u
                moved = True
        if moved:
            position.update({v: i for i, v in enumerate(layer)})
            for near, ends in ((row + 1, up), (row - 1, down)):
                if 0 <= near < len(order):
                    for v in order[near]:
                        ends[v] = sorted(position[u] for u in (above if ends is up else below)[v])


def _between(left: Sequence[int], right: Sequence[int]) -> int:
    """Crossings of the edges of two neighbours, given the sorted ends of each."""
    return sum(len(left) - bisect_right(left, end) for end in right)


def _crossings(order: Sequence[Sequence[int]], below: dict[int, list[int]]) -> int:
    total = 0
    for upper, lower in pairwise(order):
        position = {v: i for i, v in enumerate(lower)}
        ends: list[int] = []
        for u in upper:
            mine = sorted(position[v] for v in below[u])
            total += sum(len(ends) - bisect_right(ends, end) for end in mine)
            for end in mine:
                insort(ends, end)
    return total
