"""Small charts as SVG: bars of saliency, curves of a training."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from espalier.report.results import PHASES, History
from espalier.report.text import shorten, text_width

_WIDTH = 720.0


def saliency_chart(scores: Mapping[str, float], removed: Collection[str]) -> str:
    """One horizontal bar per structure, the least salient first; what was removed is red."""
    rows = sorted(scores.items(), key=lambda item: item[1])
    left = min(260.0, 24 + max((text_width(shorten(name, 30), 12) for name, _ in rows), default=0.0))
    low, high = min(0.0, *scores.values(), 0.0), max(0.0, *scores.values(), 1e-12)
    plot = _WIDTH - left - 80
    zero = left + 40 + (plot - 40) * (-low) / (high - low)
    scale = (plot - 40) / (high - low)
    height = 28 * len(rows) + 12
    parts = [_open(_WIDTH, height, "Saliency per structure")]
    for i, (name, score) in enumerate(rows):
        y = 8 + 28 * i
        kind = "gone" if name in removed else "stays"
        x, width = (zero, score * scale) if score >= 0 else (zero + score * scale, -score * scale)
        end = x + width + 6 if score >= 0 else x - 6
        anchor = "start" if score >= 0 else "end"
        parts.append(
            f'<g class="bar {kind}"><title>{escape(name)}: {score:.6g}, {kind}</title>'
            f'<text x="{left - 6:.1f}" y="{y + 14}" text-anchor="end">{escape(shorten(name, 30))}</text>'
            f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1):.1f}" height="19" rx="3"/>'
            f'<text class="value" x="{end:.1f}" y="{y + 14}" text-anchor="{anchor}">'
            f"{_number(score)}</text></g>"
        )
    parts.append(f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="2" y2="{height - 4}"/></svg>')
    return "".join(parts)


@dataclass(frozen=True)
class _Panel:
    """One curve: its values from ``low`` to ``high``, on a logarithmic scale or a linear one."""

    name: str
    kind: str
    points: Sequence[tuple[int, float]]
    low: float
    high: float
    height: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        if self.logarithmic:
            span = math.log(self.high / self.low)
            return min(max(math.log(max(value, self.low) / self.low) / span, 0.0), 1.0)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.low, self.high, 3)
        return [10.0**e for e in range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)]


def training_chart(history: History) -> str:
    """Loss, accuracy, norm of what is marked and zero structures against the step; the phases are shaded."""
    panels = _panels(history)
    total = 28 + sum(panel.height + 34 for panel in panels)
    left, right, last = 46.0, _WIDTH - 12, max(history.steps[-1].step, 1)

    def across(step: float) -> float:
        return left + (right - left) * step / last

    parts = [_open(_WIDTH, total, "Training")]
    for phase, first, end in history.phases():
        x, end_x = across(max(first - 1, 0)), across(end)
        parts.append(
            f'<rect class="phase phase-{phase}" x="{x:.1f}" y="24" width="{end_x - x:.1f}" height="{total - 44}"/>'
        )
        words = PHASES.get(phase, phase)
        if end_x - x > text_width(words, 11):
            middle = (x + end_x) / 2
            parts.append(f'<text class="phase-name" x="{middle:.1f}" y="16" text-anchor="middle">{words}</text>')
    top = 46.0
    for panel in panels:
        parts += _draw_panel(panel, left, right, top, across)
        top += panel.height + 34
    parts += [
        f'<text class="tick" x="{across(tick):.1f}" y="{total - 4:.1f}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks(0, last)
    ]
    parts.append("</svg>")
    return "".join(parts)


def _panels(history: History) -> list[_Panel]:
    steps = history.steps
    loss = [(s.step, s.loss) for s in steps if s.loss > 0]
    accuracy = [(s.step, s.accuracy) for s in steps if s.accuracy is not None]
    norm = [(s.step, s.norm) for s in steps if s.norm is not None]
    zero = [(s.step, float(s.zero)) for s in steps]
    values = [value for _, value in smooth(loss)]
    panels = []
    if values:
        low, high = min(values) / 1.5, max(values) * 1.2
        panels.append(_Panel("training loss", "loss", loss, low, high, 150, logarithmic=True))
    if accuracy:
        low = math.floor(10 * min(value for _, value in accuracy)) / 10
        panels.append(_Panel("validation accuracy", "accuracy", accuracy, min(low, 0.9), 1.0, 110))
    if norm:
        top = max(1.0, *(value for _, value in norm))
        panels.append(_Panel("norm of the redundant structures, relative", "norm", norm, 0.0, top, 80))
    if history.structures:
        panels.append(_Panel("structures at zero", "zero", zero, 0.0, float(history.structures), 70))
    return panels


def _draw_panel(panel: _Panel, left: float, right: float, top: float, across: Callable[[float], float]) -> list[str]:
    def down(value: float) -> float:
        return top + panel.height * (1 - panel.share(value))

    parts = [f'<text class="panel" x="{left}" y="{top - 7}">{panel.name}</text>']
    for tick in panel.ticks():
        y = down(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    points = panel.points
    if panel.kind == "loss":
        parts.append(f'<path class="faint" d="{_line([(across(s), down(v)) for s, v in points])}"/>')
        points = smooth(points)
    line = _line([(across(s), down(v)) for s, v in points], stepped=panel.kind == "zero")
    parts.append(f'<path class="curve {panel.kind}" d="{line}"/>')
    if panel.kind == "accuracy":
        parts += [
            f'<circle class="dot" cx="{across(step):.1f}" cy="{down(value):.1f}" r="2.6">'
            f"<title>step {step}: {100 * value:.2f} %</title></circle>"
            for step, value in points
        ]
    return parts


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``.

    >>> ticks(0, 100, 4)
    [0, 50, 100]
    """
    raw = (high - low) / wanted
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    return [round(low + i * step, 10) for i in range(int((high - low) / step + 1e-9) + 1)]


def smooth(points: Sequence[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """Exponential mean, without a bias to the start."""
    mean, mass, out = 0.0, 0.0, []
    for x, y in points:
        mean, mass = weight * mean + (1 - weight) * y, weight * mass + (1 - weight)
        out.append((x, mean / mass))
    return out


def _line(points: Sequence[tuple[float, float]], stepped: bool = False) -> str:
    if len(points) > 1200:
        points = [*points[:: len(points) // 1200 + 1], points[-1]]
    form = "H{0:.1f}V{1:.1f}" if stepped else "L{0:.1f} {1:.1f}"
    (x, y), *rest = points
    return f"M{x:.1f} {y:.1f}" + "".join(form.format(x, y) for x, y in rest)


def _number(value: float) -> str:
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def _open(width: float, height: float, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="{escape(title)}">'
    )
