"""Large figures made small enough to read: chains of joint vertices as one, parallel boxes as one, columns."""

from collections.abc import Sequence
from dataclasses import replace

from espalier.report.figures import Figure, Vertex

__all__ = ["columns", "condensed", "depth"]


def condensed(figure: Figure) -> Figure:
    """The same graph with fewer vertices.

    A sum of many terms, which a trace has as a chain of additions, becomes one vertex; boxes that join the same
    two vertices (the candidate operations of one edge) become one box with a row for each.

    >>> box, plus = Vertex("a.one"), Vertex("+", form="circle")
    >>> figure = Figure("", (Vertex("x"), box, Vertex("a.two"), plus), ((0, 1), (0, 2), (1, 3), (2, 3)))
    >>> condensed(figure).vertices[1].title, condensed(figure).vertices[1].rows
    ('a', (('one', ''), ('two', '')))
    """
    return _bundled(_summed(figure))


def columns(figure: Figure, count: int) -> list[Figure]:
    """The figure cut into about ``count`` parts of like depth, to be drawn side by side.

    Cuts lie only where one single vertex feeds all that follows. That vertex ends one part and begins the
    next one. A figure without such a place stays whole.
    """
    rank = _depths(figure)
    deepest = max(rank, default=0)
    cuts = [i for i in _cuts(figure, rank) if 0 < rank[i] < deepest]
    chosen: list[int] = []
    for k in range(1, count if cuts else 1):
        nearest = min(cuts, key=lambda i: abs(rank[i] - deepest * k / count))
        if nearest not in chosen and abs(rank[nearest] - deepest * k / count) < 0.4 * deepest / count:
            chosen.append(nearest)
    ends = [*chosen, None]
    parts = []
    for i, (first, last) in enumerate(zip([None, *chosen], ends, strict=True)):
        low, high = 0 if first is None else rank[first], deepest if last is None else rank[last]
        inside = [v for v, r in enumerate(rank) if low < r <= high or v == first or (first is None and r == low)]
        title = f"{figure.title}, {i + 1} of {len(ends)}" if chosen else figure.title
        parts.append(_part(figure, inside, title))
    return parts


def depth(figure: Figure) -> int:
    """Vertices on the longest way through the figure."""
    return max(_depths(figure), default=-1) + 1


def _summed(figure: Figure) -> Figure:
    """Every joint vertex that feeds nothing but another of its kind merges into that."""
    below: dict[int, set[int]] = {}
    for u, v in figure.edges:
        below.setdefault(u, set()).add(v)
    into = list(range(len(figure.vertices)))
    for u in reversed(_order(figure)):
        readers = below.get(u, set())
        if len(readers) != 1 or figure.vertices[u].form != "circle":
            continue
        (v,) = readers
        ours, theirs = figure.vertices[u], figure.vertices[v]
        if theirs.form == "circle" and (ours.title, ours.detail) == (theirs.title, theirs.detail):
            into[u] = into[v]
    return _merged(figure, into, {})


def _bundled(figure: Figure) -> Figure:
    above: dict[int, set[int]] = {}
    below: dict[int, set[int]] = {}
    for u, v in figure.edges:
        below.setdefault(u, set()).add(v)
        above.setdefault(v, set()).add(u)
    groups: dict[tuple[frozenset[int], frozenset[int]], list[int]] = {}
    for i, vertex in enumerate(figure.vertices):
        if vertex.form == "box" and above.get(i) and below.get(i):
            groups.setdefault((frozenset(above[i]), frozenset(below[i])), []).append(i)
    into, boxes = list(range(len(figure.vertices))), {}
    for members in groups.values():
        if len(members) > 1:
            boxes[members[0]] = _bundle([figure.vertices[i] for i in members])
            for i in members:
                into[i] = members[0]
    return _merged(figure, into, boxes)


def _bundle(vertices: Sequence[Vertex]) -> Vertex:
    paths = [vertex.title.split(".") for vertex in vertices]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    names = [
        path[shared] if len({p[shared] for p in paths}) == len(paths) else ".".join(path[shared:]) for path in paths
    ]
    statuses = {vertex.status for vertex in vertices}
    return replace(
        vertices[0],
        title=".".join(paths[0][:shared]) or f"{len(vertices)} in parallel",
        detail="",
        strip=(),
        rows=tuple((name, vertex.status) for name, vertex in zip(names, vertices, strict=True)),
        tooltip="\n".join(vertex.tooltip.split("\n")[0] for vertex in vertices),
        status=statuses.pop() if len(statuses) == 1 else "",
    )


def _merged(figure: Figure, into: Sequence[int], changed: dict[int, Vertex]) -> Figure:
    kept = sorted(set(into))
    place = {old: new for new, old in enumerate(kept)}
    edges = [(place[into[u]], place[into[v]]) for u, v in figure.edges if into[u] != into[v]]
    vertices = tuple(changed.get(i, figure.vertices[i]) for i in kept)
    return Figure(figure.title, vertices, tuple(dict.fromkeys(edges)))


def _order(figure: Figure) -> list[int]:
    rank = _depths(figure)
    return sorted(range(len(rank)), key=lambda i: rank[i])


def _depths(figure: Figure) -> list[int]:
    """Length of the longest way from an input to each vertex."""
    below: list[list[int]] = [[] for _ in figure.vertices]
    waiting = [0] * len(figure.vertices)
    for u, v in figure.edges:
        below[u].append(v)
        waiting[v] += 1
    ready = [i for i, count in enumerate(waiting) if not count]
    rank = [0] * len(figure.vertices)
    for u in ready:  # grows while it is read
        for v in below[u]:
            rank[v] = max(rank[v], rank[u] + 1)
            waiting[v] -= 1
            if not waiting[v]:
                ready.append(v)
    return rank


def _cuts(figure: Figure, rank: Sequence[int]) -> list[int]:
    """Vertices that alone feed all that lies deeper, the shallowest first."""
    found = []
    for i in _order(figure):
        crossing = {u for u, v in figure.edges if rank[u] <= rank[i] < rank[v]}
        if crossing == {i}:
            found.append(i)
    return found


def _part(figure: Figure, inside: Sequence[int], title: str) -> Figure:
    place = {old: new for new, old in enumerate(inside)}
    edges = tuple((place[u], place[v]) for u, v in figure.edges if u in place and v in place)
    return Figure(title, tuple(figure.vertices[i] for i in inside), edges)
