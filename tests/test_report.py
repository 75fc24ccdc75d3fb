"""Layout, drawings, charts and the page."""

import random
import re
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

import espalier
from espalier.errors import EspalierError
from espalier.graph.trace import trace
from espalier.report import Check, History, Measurement, Report, Step, draw_network, draw_segments, draw_trace
from espalier.report.charts import saliency_chart, smooth, ticks, training_chart
from espalier.report.draw import draw_beside
from espalier.report.figures import folded_figure, trace_figure
from espalier.report.layout import layout
from espalier.report.operators import quantity
from espalier.report.results import difference, latencies, measure_all
from espalier.report.segment_figures import segment_figure
from espalier.report.text import shorten
from espalier.space.search_space import SearchSpace

SVG = "{http://www.w3.org/2000/svg}"


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.norm(self.left(x)).relu() + self.right(x)
        return self.out(x.mean((2, 3)))


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    torch.manual_seed(0)
    return espalier.search_space(Branches(), (torch.randn(2, 1, 6, 6),))


def random_graph(count: int, seed: int):
    draw = random.Random(seed)
    sizes = [(draw.uniform(20, 160), draw.choice([28.0, 42.0, 54.0])) for _ in range(count)]
    edges = [(max(0, v - draw.randint(1, 5)), v) for v in range(1, count)]
    edges += [(max(0, v - draw.randint(1, 25)), v) for v in range(1, count) if draw.random() < 0.4]
    return sizes, edges


def crossed(box, points) -> bool:
    """Whether a route's vertical stretches run through a box."""
    (left, top, right, bottom) = box
    stretches = zip(points[1:-1:2], points[2:-1:2], strict=True)
    return any(left < x < right and y < bottom and to_y > top for (x, y), (_, to_y) in stretches)


@pytest.mark.parametrize("seed", range(8))
def test_no_two_boxes_overlap_and_edges_go_down(seed):
    sizes, edges = random_graph(60, seed)
    laid = layout(sizes, edges)
    boxes = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in zip(laid.centres, sizes, strict=True)]
    for i, a in enumerate(boxes):
        assert a[0] >= -1e-6
        assert a[1] >= -1e-6
        assert a[2] <= laid.width + 1e-6
        assert a[3] <= laid.height + 1e-6
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert set(laid.routes) == set(edges)
    for (u, v), points in laid.routes.items():
        assert laid.layers[u] < laid.layers[v]
        heights = [y for _, y in points]
        assert heights == sorted(heights)
        assert not any(crossed(box, points) for box in boxes)


def test_layout_is_deterministic_and_fast():
    sizes, edges = random_graph(1000, 0)
    start = time.process_time()
    first = layout(sizes, edges)
    assert time.process_time() - start < 5
    assert layout(sizes, edges) == first


def test_layout_takes_out_a_needless_crossing():
    laid = layout([(40, 20)] * 4, [(0, 3), (1, 2)])
    (a, b, c, d) = (x for x, _ in laid.centres)
    assert (a < b) == (d < c)


def test_layout_refuses_a_cycle_and_takes_nothing():
    with pytest.raises(ValueError, match="cycle"):
        layout([(1, 1)] * 2, [(0, 1), (1, 0)])
    assert layout([], []).centres == ()


def test_an_input_sits_above_its_first_reader():
    laid = layout([(40, 20)] * 5, [(0, 1), (1, 2), (2, 3), (4, 3)])
    assert laid.layers[4] == laid.layers[3] - 1


def elements(svg: str, wanted: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if wanted in (e.get("class") or "").split()]


def test_trace_drawing_shows_every_operator(space):
    svg = draw_trace(space.trace)
    assert len(elements(svg, "es-circle")) == 1
    assert len(elements(svg, "es-pill")) == 2
    assert len(elements(svg, "es-edge")) == 11
    tooltips = " ".join(e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}title"))
    assert "40 parameters" in tooltips
    assert "1,296 MACs per example" in tooltips
    assert "test_report.py:" in tooltips
    assert "4×6×6" in svg
    assert draw_trace(space.trace) == svg


def test_segment_drawing_marks_candidates_and_redundant(space):
    assert [s.name for s in space.structures] == ["left-norm", "right"]
    assert len(elements(draw_segments(space), "es-candidate")) == 2 + 1  # and the legend
    marked = draw_segments(space, ["right"])
    assert len([e for e in elements(marked, "es-removed") if "es-box" in e.get("class").split()]) == 1
    assert len([e for e in elements(marked, "es-removed") if "es-edge" in e.get("class").split()]) == 2


def test_what_rests_on_nothing_is_idle():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            inner = self.a(x) + self.b(x)
            return self.d(self.c(inner) + x)

    space = espalier.search_space(Chain(), (torch.randn(2, 4),))
    states = {v.title: v.status for v in segment_figure(space, ["c"]).vertices}
    assert states["c"] == "removed"
    assert states["a"] == states["b"] == "idle"
    assert states["d"] == ""


def test_the_constructed_network_is_drawn(space):
    small = espalier.construct(space, space.solution(["right"]))
    svg = draw_network(small, space.trace.args)
    assert ">left<" in svg
    assert ">right<" not in svg
    assert not elements(svg, "es-circle")
    titles = [v.title for v in folded_figure(trace(small, space.trace.args)).vertices]
    assert titles == ["x", "stem", "left-norm", "out", "output"]


def test_several_inputs_and_outputs_and_awkward_names():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a<b&c", nn.Linear(3, 3))

        def forward(self, x, y):
            z = self.get_submodule("a<b&c")(x) * y
            return z, z.relu()

    svg = draw_network(Two(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert len(elements(svg, "es-pill")) == 4
    assert "a&lt;b&amp;c" in svg


def test_drawings_beside_each_other_are_one_svg(space):
    svg = draw_beside([trace_figure(space.trace), segment_figure(space)], "both")
    assert len(elements(svg, "es-caption")) == 2


def history() -> History:
    found = History(structures=3, target=2)
    for step in range(1, 31):
        phase = "warmup" if step <= 10 else "hybrid" if step <= 20 else "done"
        accuracy = step / 40 if step % 5 == 0 else None
        norm = None if step <= 10 else max(0.0, 2 - step / 10)
        found.add(Step(step, phase, 2.0 / step, 0.1, 2 if step >= 20 else 0, accuracy, norm))
    return found


def test_charts_are_well_formed():
    course = history()
    assert course.phases() == [("warmup", 1, 10), ("hybrid", 11, 20), ("done", 21, 30)]
    chart = training_chart(course)
    assert len(elements(chart, "phase")) == 3
    assert len(elements(chart, "curve")) == 4
    bars = saliency_chart({"a": 0.5, "b<": -0.2}, ["b<"])
    assert len(elements(bars, "gone")) == 1
    assert [e.text for e in elements(bars, "value")] == ["-0.200", "0.500"]


def page(space: SearchSpace) -> str:
    return Report(
        title="A <title>",
        lead="lead",
        figures=[trace_figure(space.trace), segment_figure(space, ["right"])],
        captions=["every operator"],
        summary=space.summary(),
        networks={"full": Measurement(100, 1000, 2e-3, 8, 0.9), "small": Measurement(50, 400, 1e-3, 8, 0.91)},
        checks=[Check("same", 0.0), Check("other", 1.0)],
        saliency={"left-norm": 0.4, "right": 0.1},
        removed=["right"],
        history=history(),
    ).html()


def test_the_page_needs_nothing_beside_it(space):
    text = page(space)
    assert set(re.findall(r"https?://[^\"'<> )]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=|@import|url\(", text)
    assert "A &lt;title&gt;" in text
    for words in (
        "−50 %",
        "+1.00 points",
        "Some fail",
        "holds",
        "fails",
        "removed",
        "prefers-color-scheme:dark",
    ):
        assert words in text
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_a_page_of_little_has_no_empty_parts():
    text = Report(title="Small", lead="").html()
    assert "<section" not in text
    assert "data-drawing>" not in text


def test_the_page_is_written_whole(space, tmp_path):
    Report(title="One", lead="").write(tmp_path / "new" / "report.html")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]


def test_measurements_leave_the_modes_alone(space):
    model = space.model.train()
    found = measure_all({"a": model, "b": model}, space.trace.args, lambda _: 0.5, seconds=0.001)
    assert model.training
    assert found["a"].params == sum(p.numel() for p in model.parameters())
    assert found["a"].batch == 2
    assert found["a"].latency > 0
    assert set(latencies({"a": model}, space.trace.args, rounds=1, seconds=0.001)) == {"a"}


def test_a_difference_that_is_no_number_does_not_pass():
    assert difference([torch.ones(2)], [torch.tensor([1.0, 1.5])]) == 0.5
    assert not Check("nan", difference(torch.tensor([float("nan"), 1.0]), torch.ones(2)), 1.0).passed
    assert not Check("nan", difference(torch.tensor([1.0, float("nan")]), torch.ones(2)), 1.0).passed
    assert not Check("shape", difference(torch.ones(2), torch.ones(3)), 1.0).passed


def test_numbers_in_words():
    assert [quantity(n) for n in (0, 999, 1000, 818_442, 104_989_952, 9_996)] == [
        "0", "999", "1.00 k", "818 k", "105 M", "10.0 k"
    ]  # fmt: skip
    assert ticks(0, 1, 3) == [0.0, 0.5, 1.0]
    assert smooth([(0, 2.0), (1, 2.0)])[-1][1] == pytest.approx(2.0)
    assert len(shorten("x" * 80)) == 34


def test_errors_of_tracing_reach_the_caller():
    with pytest.raises(EspalierError):
        draw_network(Branches(), (torch.randn(2, 3, 6, 6),))
