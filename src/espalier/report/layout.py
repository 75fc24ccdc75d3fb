"""Where the vertices and edges of a drawing lie: layers from top to bottom, no two boxes overlapping.

Sugiyama's method in three steps: layers by longest paths, an order within each layer with few crossings
(:mod:`.ordering`), and x coordinates that keep long edges straight (:mod:`.coordinates`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from espalier.report.coordinates import x_coordinates
from espalier.report.ordering import order_layers

Point = tuple[float, float]

_DUMMY_WIDTH = 10.0


@dataclass(frozen=True)
class Layout:
    """``centres`` of the vertices; ``routes``: per edge the points that its curve passes through, downwards.

    A route alternates: leave a vertex, enter a layer, leave it, …, enter a vertex. Within a layer it runs
    vertically, in room of its own.
    """

    centres: tuple[Point, ...]
    routes: dict[tuple[int, int], tuple[Point, ...]]
    layers: tuple[int, ...]
    width: float
    height: float


def layout(
    sizes: Sequence[Point], edges: Sequence[tuple[int, int]], gap_x: float = 26.0, gap_y: float = 30.0
) -> Layout:
    """Lay out a directed acyclic graph.

    >>> laid = layout([(40, 20), (40, 20)], [(0, 1)])
    >>> laid.centres
    ((20.0, 10.0), (20.0, 60.0))

    ``sizes`` are the (width, height) of the vertices' boxes, ``edges`` pairs of their positions in ``sizes``.
    Takes O(sweeps · (V + E + D) · log) for D crossings of an edge with a layer; all long edges of one vertex
    share their way. Raises ``ValueError`` if there is a cycle.
    """
    edges = list(dict.fromkeys(edges))
    if not sizes:
        return Layout((), {}, (), 0.0, 0.0)
    rank = _ranks(len(sizes), edges)
    layers, pairs, chains = _with_dummies(rank, edges)
    widths = [w for w, _ in sizes] + [_DUMMY_WIDTH] * (sum(map(len, layers)) - len(sizes))
    order = order_layers(layers, pairs)
    xs = x_coordinates(order, pairs, widths, len(sizes), gap_x)
    left = min(x - w / 2 for x, w in zip(xs, widths, strict=True))
    xs = [x - left for x in xs]
    tops, bottoms = _rows(order, sizes, pairs, xs, gap_y)
    centres = tuple((xs[v], (tops[rank[v]] + bottoms[rank[v]]) / 2) for v in range(len(sizes)))
    routes: dict[tuple[int, int], tuple[Point, ...]] = {}
    for u, v in edges:
        points = [(xs[u], centres[u][1] + sizes[u][1] / 2)]
        for dummy, row in zip(chains[u], range(rank[u] + 1, rank[v]), strict=False):
            points += [(xs[dummy], tops[row]), (xs[dummy], bottoms[row])]
        points.append((xs[v], centres[v][1] - sizes[v][1] / 2))
        routes[u, v] = tuple(points)
    width = max(x + w / 2 for x, w in zip(xs, widths, strict=True))
    return Layout(centres, routes, tuple(rank), width, bottoms[-1])


def _ranks(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Longest-path layers; what has no predecessor sits just above its first reader."""
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for u, v in edges:
        below[u].append(v)
        above[v].append(u)
    waiting = [len(a) for a in above]
    ready = [v for v in range(count) if not waiting[v]]
    rank = [0] * count
    done = 0
    while done < len(ready):
        u = ready[done]
        done += 1
        for v in below[u]:
            rank[v] = max(rank[v], rank[u] + 1)
            waiting[v] -= 1
            if not waiting[v]:
                ready.append(v)
    if done < count:
        raise ValueError("the graph has a cycle: only directed acyclic graphs can be drawn in layers")
    for v in reversed(ready):
        if below[v] and len(above[v]) == 0:
            rank[v] = min(rank[w] for w in below[v]) - 1
    return rank


def _with_dummies(
    rank: Sequence[int], edges: Sequence[tuple[int, int]]
) -> tuple[list[list[int]], list[tuple[int, int]], dict[int, list[int]]]:
    """Break edges that span layers: one chain of dummies per source, shared by all its long edges."""
    layers: list[list[int]] = [[] for _ in range(max(rank) + 1)]
    for v, r in enumerate(rank):
        layers[r].append(v)
    pairs: list[tuple[int, int]] = []
    chains: dict[int, list[int]] = {u: [] for u, _ in edges}
    fresh = len(rank)
    for u, v in edges:
        chain = chains[u]
        while len(chain) < rank[v] - rank[u] - 1:
            pairs.append((chain[-1] if chain else u, fresh))
            chain.append(fresh)
            layers[rank[u] + len(chain)].append(fresh)
            fresh += 1
        last = rank[v] - rank[u] - 2
        pairs.append((chain[last] if last >= 0 else u, v))
    return layers, pairs, chains


def _rows(
    order: Sequence[Sequence[int]],
    sizes: Sequence[Point],
    pairs: Sequence[tuple[int, int]],
    xs: Sequence[float],
    gap: float,
) -> tuple[list[float], list[float]]:
    """Top and bottom of each layer; wider gaps where edges lead far to the side."""
    row_of = {v: r for r, row in enumerate(order) for v in row}
    reach = [0.0] * len(order)
    for u, v in pairs:
        reach[row_of[u]] = max(reach[row_of[u]], abs(xs[u] - xs[v]))
    tops, bottoms = [], []
    y = 0.0
    for row, sideways in zip(order, reach, strict=True):
        height = max((sizes[v][1] for v in row if v < len(sizes)), default=0.0)
        tops.append(y)
        bottoms.append(y + height)
        y += height + gap + min(0.08 * sideways, 1.5 * gap)
    return tops, bottoms
