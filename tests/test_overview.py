"""Large figures made small: nothing gets lost when boxes merge and columns are cut."""

import itertools
import random

import pytest
import torch

from espalier.models import DARTS, RegNetX
from espalier.report.condense import columns, condensed, depth
from espalier.report.figures import Figure, Vertex
from espalier.report.overview import draw_space
from espalier.report.segment_figures import segment_figure
from espalier.space.search_space import search_space


def reaches(figure: Figure) -> set[tuple[str, str]]:
    """Pairs of names (a box's rows stand for boxes) such that the second lies behind the first."""
    below: dict[int, list[int]] = {}
    for u, v in figure.edges:
        below.setdefault(u, []).append(v)

    def names(i: int) -> list[str]:
        vertex = figure.vertices[i]
        return [name for name, _ in vertex.rows] or ([vertex.title] if vertex.form != "circle" else [])

    found = set()
    for start in range(len(figure.vertices)):
        pending, seen = [start], set()
        while pending:
            for v in below.get(pending.pop(), []):
                if v not in seen:
                    seen.add(v)
                    pending.append(v)
        found |= {(a, b) for v in seen for a in names(start) for b in names(v)}
    return found


def drawn(seed: int) -> Figure:
    """A random network of branches that are added up, without dots in its names."""
    rng = random.Random(seed)
    vertices, edges, last = [Vertex("input", form="pill")], [], 0
    for block in range(rng.randint(1, 6)):
        ends = [last] if rng.random() < 0.5 else []
        for branch in range(rng.randint(2, 4)):
            vertices.append(Vertex(f"b{block}-{branch}", status=rng.choice(["", "candidate", "removed"])))
            edges.append((last, len(vertices) - 1))
            ends.append(len(vertices) - 1)
        total = ends[0]
        for end in ends[1:]:
            vertices.append(Vertex("+", form="circle"))
            edges += [(total, len(vertices) - 1), (end, len(vertices) - 1)]
            total = len(vertices) - 1
        vertices.append(Vertex(f"after{block}"))
        edges.append((total, len(vertices) - 1))
        last = len(vertices) - 1
    return Figure("random", tuple(vertices), tuple(dict.fromkeys(edges)))


@pytest.mark.parametrize("seed", range(20))
def test_condensed_keeps_what_leads_where(seed: int) -> None:
    figure = drawn(seed)
    small = condensed(figure)
    assert reaches(small) == reaches(figure)
    assert len(small.vertices) < len(figure.vertices)
    boxes = {v.title: v.status for v in figure.vertices if v.form == "box"}
    rows = [row for v in small.vertices for row in v.rows]
    rows += [(v.title, v.status) for v in small.vertices if v.form == "box" and not v.rows]
    assert dict(rows) == boxes
    assert len(rows) == len(boxes)


@pytest.mark.parametrize("seed", range(20))
def test_columns_lose_no_vertex_and_no_edge(seed: int) -> None:
    figure = condensed(drawn(seed))
    parts = columns(figure, 3)
    named = [figure.vertices[u].title for u, _ in figure.edges]
    assert sum(len(part.edges) for part in parts) == len(figure.edges)
    assert sum(len(part.vertices) for part in parts) == len(figure.vertices) + len(parts) - 1
    assert {part.vertices[u].title for part in parts for u, _ in part.edges} == set(named)
    for before, after in itertools.pairwise(parts):
        assert any(v in after.vertices for v in before.vertices), "the vertex that ends one part begins the next"


def test_cells_of_darts_become_one_box_per_edge() -> None:
    space = search_space(DARTS(4, 1, nodes=2, affine=True), (torch.zeros(1, 3, 8, 8),))
    removed = [s.name for s in space.structures if "edges.0_2.sep_conv_3x3" in s.name]
    small = condensed(segment_figure(space, removed))
    box = next(v for v in small.vertices if v.title.endswith("edges.0_2"))
    rows = dict(box.rows)
    assert set(rows) >= {"max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3"}
    assert (rows["sep_conv_3x3"], rows["sep_conv_5x5"], rows["max_pool_3x3"]) == ("removed", "candidate", "")


def test_long_networks_are_cut_into_columns() -> None:
    model = RegNetX((8, 16), (6, 6), 8, strides=(1, 2))
    space = search_space(model, (torch.zeros(1, 3, 8, 8),))
    figure = condensed(segment_figure(space))
    svg = draw_space(space, removed=[space.structures[1].name], title="Long")
    assert depth(figure) > 24
    assert "Long, 2 of" in svg
    assert "es-removed" in svg
