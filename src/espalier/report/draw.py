"""Figures as SVG, by this program alone."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torch import nn

from espalier.graph.trace import Trace
from espalier.report.figures import Figure, Vertex, network_figure, trace_figure
from espalier.report.layout import Layout, Point, layout
from espalier.report.operators import KINDS
from espalier.report.segment_figures import segment_figure
from espalier.report.style import FONT, drawing_style
from espalier.report.text import shorten, text_width
from espalier.space.search_space import SearchSpace

_MARGIN = 22.0
_RADIUS = 17.0
_APART = 40.0
_CAPTION = 34.0
_ROW = 17.0
_STATUS = {"candidate": "removable structure", "removed": "redundant: removed", "idle": "no longer needed"}


def draw_trace(traced: Trace) -> str:
    """The trace graph as SVG text.

    >>> from espalier.graph.trace import trace
    >>> import torch
    >>> draw_trace(trace(nn.Linear(4, 2), torch.randn(3, 4)))[:4]
    '<svg'
    """
    return draw(trace_figure(traced))


def draw_segments(space: SearchSpace, removed: Iterable[str] = ()) -> str:
    """The segment graph as SVG text: structures highlighted, those in ``removed`` dotted and red."""
    return draw(segment_figure(space, removed))


def draw_network(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> str:
    """Any network as SVG text, traced on example inputs."""
    return draw(network_figure(network, args, kwargs))


def draw(figure: Figure, *, legend: bool = True, style: bool = True) -> str:
    """A figure as one ``<svg>`` element; ``style=False`` leaves the styles to the page around it."""
    body, width, height = _body(figure)
    key, key_width, key_height = _legend([figure], 620) if legend else ("", 0.0, 0.0)
    full = max(width, key_width)
    inside = f"{key}{_moved(body, (full - width) / 2, key_height)}"
    return _svg(inside, full, height + key_height, figure.title, style)


def draw_beside(figures: Sequence[Figure], title: str) -> str:
    """Several figures in a row, each below its own title, with one legend."""
    bodies = [_body(figure) for figure in figures]
    width, height = sum(w for _, w, _ in bodies) + _APART * (len(bodies) - 1), max(h for _, _, h in bodies)
    key, key_width, key_height = _legend(figures, width)
    parts = [_moved(key, (width - key_width) / 2, height + _CAPTION + 24)]
    x = 0.0
    for figure, (body, own, _) in zip(figures, bodies, strict=True):
        words = escape(figure.title)
        caption = f'<text class="es-caption" text-anchor="middle" x="{own / 2:.1f}" y="14">{words}</text>'
        parts.append(_moved(caption + _moved(body, 0, _CAPTION), x, 0))
        x += own + _APART
    return _svg("".join(parts), width, height + key_height + _CAPTION + 10, title, style=True)


def _svg(inside: str, width: float, height: float, title: str, style: bool) -> str:
    width, height = width + 2 * _MARGIN, height + 2 * _MARGIN
    paper = f'<rect class="es-paper" width="{width:.0f}" height="{height:.0f}"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="es" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{escape(title)}" '
        f'font-family="{escape(FONT)}"><title>{escape(title)}</title>'
        + (f"<style>{drawing_style()}</style>{paper}" if style else "")
        + f"{_moved(inside, _MARGIN, _MARGIN)}</svg>"
    )


def _moved(inside: str, x: float, y: float) -> str:
    return f'<g transform="translate({x:.1f} {y:.1f})">{inside}</g>'


def _body(figure: Figure) -> tuple[str, float, float]:
    """The figure alone: (SVG, width, height)."""
    sizes = [_size(vertex) for vertex in figure.vertices]
    laid = layout(sizes, figure.edges, gap_y=26.0)
    boxes = zip(figure.vertices, laid.centres, sizes, strict=True)
    parts = [*_edges(figure, laid), *(_vertex(vertex, centre, size) for vertex, centre, size in boxes)]
    return "\n".join(parts), laid.width, laid.height


def _size(vertex: Vertex) -> Point:
    if vertex.form == "circle":
        return 2 * _RADIUS + 2 * (text_width(vertex.note, 10.5) + 6), 2 * _RADIUS
    if vertex.form == "pill":
        return text_width(vertex.title, 12.5, bold=True) + text_width(vertex.detail, 11) + 40, 28.0
    head = text_width(shorten(vertex.title), 12.5, bold=True)
    if vertex.rows:
        widest = max(text_width(shorten(words), 11) for words, _ in vertex.rows)
        return max(head, widest, 56) + 30, 30.0 + _ROW * len(vertex.rows)
    head += text_width(vertex.note, 11) + 8 if vertex.note else 0
    strip = 12 * min(len(vertex.strip), 16)
    return max(head, text_width(vertex.detail, 10.5), strip, 56) + 30, 54.0 if vertex.strip else 42.0


def _edges(figure: Figure, laid: Layout) -> list[str]:
    """The edges of what goes lie below those of what stays."""
    parts: list[tuple[int, str]] = []
    for (u, v), points in _spread(figure, laid).items():
        ends = {figure.vertices[u].status, figure.vertices[v].status}
        status = "removed" if "removed" in ends else "idle" if "idle" in ends else ""
        layer = {"idle": 0, "removed": 1, "": 2}[status]
        classes = f"es-edge es-{status}" if status else "es-edge"
        tip = points[-1]
        head = f"M{tip[0]:.1f} {tip[1]:.1f}l-4 -7q4 2 8 0z"
        parts.append((layer, f'<g class="{classes}"><path d="{_curve(points)}"/><path class="es-tip" d="{head}"/></g>'))
    return [text for _, text in sorted(parts, key=lambda part: part[0])]


def _spread(figure: Figure, laid: Layout) -> dict[tuple[int, int], tuple[Point, ...]]:
    """Edges that enter one vertex end side by side, in the order in which they come."""
    entering: dict[int, list[tuple[int, int]]] = {}
    for edge in laid.routes:
        entering.setdefault(edge[1], []).append(edge)
    routes = dict(laid.routes)
    for v, edges in entering.items():
        edges.sort(key=lambda edge: laid.routes[edge][-2][0])
        step = min(13.0, 24.0 / max(len(edges) - 1, 1))
        for i, edge in enumerate(edges):
            points = routes[edge]
            x, y = points[-1]
            aside = (i - (len(edges) - 1) / 2) * step
            sag = _RADIUS - (_RADIUS**2 - aside**2) ** 0.5 if figure.vertices[v].form == "circle" else 0.0
            routes[edge] = (*points[:-1], (x + aside, y + sag))
    return routes


def _curve(points: tuple[Point, ...]) -> str:
    """Vertical through layers, smooth between them."""
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for i in range(0, len(points) - 1, 2):
        (x, y), (to_x, to_y) = points[i], points[i + 1]
        if i + 2 >= len(points):
            to_y -= 5
        if abs(x - to_x) < 0.05:
            path += f"V{to_y:.1f}"
        else:
            bend = 0.55 * (to_y - y)
            path += f"C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}"
        if i + 2 < len(points):
            path += f"V{points[i + 2][1]:.1f}"
    return path


def _vertex(vertex: Vertex, centre: Point, size: Point) -> str:
    x, y = centre
    width, height = size
    left, top = x - width / 2, y - height / 2
    status = f" es-{vertex.status}" if vertex.status else ""
    parts = [f'<g class="es-node es-{vertex.form} k-{vertex.kind}{status}"><title>{escape(vertex.tooltip)}</title>']
    if vertex.form == "circle":
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}"/>')
        parts.append(f'<text class="es-glyph" x="{x:.1f}" y="{y + 6:.1f}">{escape(vertex.title)}</text>')
        parts.append(f'<text class="es-side" x="{x + _RADIUS + 5:.1f}" y="{y - 7:.1f}">{escape(vertex.note)}</text>')
    elif vertex.form == "pill":
        parts.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="14"/>')
        parts.append(f'<text class="es-head" text-anchor="middle" x="{x:.1f}" y="{y + 4.3:.1f}">{escape(vertex.title)}')
        parts.append(f'<tspan class="es-note" dx="7">{escape(vertex.detail)}</tspan></text>')
    else:
        parts.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="8"/>')
        note = f'<tspan class="es-note" dx="7">{escape(vertex.note)}</tspan>' if vertex.note else ""
        title = escape(shorten(vertex.title))
        parts.append(f'<text class="es-head" text-anchor="middle" x="{x:.1f}" y="{top + 18:.1f}">{title}{note}</text>')
        parts.append(
            f'<text class="es-detail" text-anchor="middle" x="{x:.1f}" y="{top + 33:.1f}">'
            f"{escape(vertex.detail)}</text>"
        )
        parts += _rows(vertex, left, top + 25, width)
        parts += _strip(vertex.strip, x, top + 40)
    parts.append("</g>")
    return "".join(parts)


def _rows(vertex: Vertex, left: float, top: float, width: float) -> list[str]:
    """One line per structure that the box stands for, marked like a box of its own."""
    parts = []
    for i, (words, status) in enumerate(vertex.rows):
        y = top + _ROW * i
        mark = f" es-{status}" if status else ""
        box = f'<rect x="{left + 7:.1f}" y="{y:.1f}" width="{width - 14:.1f}" height="14" rx="4"/>'
        text = (
            f'<text text-anchor="middle" x="{left + width / 2:.1f}" y="{y + 10.6:.1f}">{escape(shorten(words))}</text>'
        )
        parts.append(f'<g class="es-row{mark}">{box}{text}</g>')
    return parts


def _strip(kinds: tuple[str, ...], x: float, y: float) -> list[str]:
    """One small tile per node of a segment, in its kind's colour."""
    shown = kinds if len(kinds) <= 16 else kinds[:16]
    left = x - 6 * len(shown) + 1
    return [
        f'<rect class="es-tile k-{kind}" x="{left + 12 * i:.1f}" y="{y:.1f}" width="10" height="6" rx="2"/>'
        for i, kind in enumerate(shown)
    ]


def _legend(figures: Sequence[Figure], limit: float) -> tuple[str, float, float]:
    """What the colours mean, of those that occur: (SVG, width, height)."""
    vertices = [vertex for figure in figures for vertex in figure.vertices]
    used = {vertex.kind for vertex in vertices} | {kind for vertex in vertices for kind in vertex.strip}
    statuses = {vertex.status for vertex in vertices} | {status for vertex in vertices for _, status in vertex.rows}
    entries = [(f"k-{kind}", words) for kind, words in KINDS.items() if kind in used]
    entries += [(f"es-{status}", words) for status, words in _STATUS.items() if status in statuses]
    parts, x, y, widest = ['<g class="es-legend">'], 0.0, 0.0, 0.0
    for classes, words in entries:
        step = 36 + text_width(words, 11)
        if x > 0 and x + step > limit:
            x, y = 0.0, y + 20
        parts.append(f'<g class="es-node {classes}"><rect x="{x:.1f}" y="{y:.1f}" width="16" height="11" rx="3"/></g>')
        parts.append(f'<text x="{x + 22:.1f}" y="{y + 9.5:.1f}">{escape(words)}</text>')
        x += step
        widest = max(widest, x)
    parts.append("</g>")
    return "".join(parts), widest, y + 32 if entries else 0.0
