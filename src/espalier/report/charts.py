"""Small charts as SVG: bars of saliency, curves of a training."""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

from espalier.report.results import History
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
            f'<g class="bar {kind}"><title>{escape(name)}: {score:.6g}{", removed" if kind == "gone" else ""}</title>'
            f'<text x="{left - 6:.1f}" y="{y + 14}" text-anchor="end">{escape(shorten(name, 30))}</text>'
            f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1):.1f}" height="19" rx="3"/>'
            f'<text class="value" x="{end:.1f}" y="{y + 14}" text-anchor="{anchor}">{_number(score)}</text></g>'
        )
    parts.append(f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="2" y2="{height - 4}"/></svg>')
    return "".join(parts)


def training_chart(history: History) -> str:
    """Loss, accuracy and zero structures against the step; the phases are shaded."""
    steps = history.steps
    panels = [
        ("training loss", [(s.step, s.loss) for s in steps], None, "loss"),
        (
            "validation accuracy",
            [(s.step, s.accuracy) for s in steps if s.accuracy is not None],
            1.0,
            "accuracy",
        ),
        ("structures at zero", [(s.step, float(s.zero)) for s in steps], float(history.structures), "zero"),
    ]
    heights = (170.0, 130.0, 90.0)
    total = 28 + sum(heights) + 34 * len(panels)
    left, right, last = 46.0, _WIDTH - 12, max(steps[-1].step, 1)
    x_of = lambda step: left + (right - left) * step / last  # noqa: E731
    parts = [_open(_WIDTH, total, "Training")]
    top = 24.0
    for phase, first, end in history.phases():
        x, width = x_of(max(first - 1, 0)), x_of(end) - x_of(max(first - 1, 0))
        words = {"warmup": "warm-up", "hybrid": "half-space steps", "done": "final training"}.get(
            phase, phase
        )
        parts.append(
            f'<rect class="phase phase-{phase}" x="{x:.1f}" y="{top}" width="{width:.1f}" height="{total - 44}"/>'
        )
        if width > text_width(words, 11):
            parts.append(
                f'<text class="phase-name" x="{x + width / 2:.1f}" y="16" text-anchor="middle">{words}</text>'
            )
    for (name, points, ceiling, kind), height in zip(panels, heights, strict=True):
        top += 22
        parts += _panel(name, points, ceiling, kind, (left, right, top, top + height), x_of, history)
        top += height + 12
    for tick in ticks(0, last):
        parts.append(
            f'<text class="tick" x="{x_of(tick):.1f}" y="{total - 4:.1f}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _panel(name, points, ceiling, kind, box, x_of, history) -> list[str]:  # type: ignore[no-untyped-def]
    left, right, top, bottom = box
    if not points:
        return []
    high = ceiling if ceiling is not None else max(v for _, v in points) * 1.02
    high = high or 1.0
    y_of = lambda value: bottom - (bottom - top) * min(max(value / high, 0.0), 1.0)  # noqa: E731
    parts = [f'<text class="panel" x="{left}" y="{top - 7}">{name}</text>']
    for tick in ticks(0, high, 3):
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    if kind == "loss":
        parts.append(f'<path class="faint {kind}" d="{_line([(x_of(s), y_of(v)) for s, v in points])}"/>')
        points = smooth(points)
    if kind == "zero":
        y = y_of(history.target)
        parts.append(f'<line class="target" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{right - 4}" y="{y - 4:.1f}" text-anchor="end">budget</text>')
    parts.append(
        f'<path class="curve {kind}" d="{_line([(x_of(s), y_of(v)) for s, v in points], kind == "zero")}"/>'
    )
    if kind == "accuracy":
        for step, value in points:
            parts.append(
                f'<circle class="dot" cx="{x_of(step):.1f}" cy="{y_of(value):.1f}" r="2.6">'
                f"<title>step {step}: {100 * value:.2f} %</title></circle>"
            )
    return parts


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``.

    >>> ticks(0, 100, 4)
    [0.0, 50.0, 100.0]
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
    path = "".join(
        f"{'HV'[0] + f'{x:.1f}V' if stepped and i else 'L' + f'{x:.1f} '}{y:.1f}"
        for i, (x, y) in enumerate(points)
    )
    return "M" + path[1:]


def _number(value: float) -> str:
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def _open(width: float, height: float, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">'
    )
