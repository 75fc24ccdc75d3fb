"""The norm of every group over time, as a heat map in SVG."""

from collections.abc import Mapping, Sequence
from html import escape

from espalier.report.charts import ticks
from espalier.report.text import text_width

_WIDTH, _ROW, _TOP, _LEVELS = 1080.0, 11.0, 22.0, 20


def heatmap(norms: Sequence[Mapping[str, float]], steps: Sequence[int], columns: int = 160) -> str:
    """One row per group, one column per line of the log; dark is large, red is exactly zero.

    >>> heatmap([{"a": 1.0, "b": 2.0}, {"a": 0.0, "b": 1.0}], [1, 2])[:4]
    '<svg'

    Every row is relative to its own first norm, so that groups of all sizes show: it is full at that norm and
    beyond. Groups are in the order of their names' first appearance; ``columns`` bounds the width.
    """
    if not norms:
        return ""
    every = max(1, -(-len(norms) // columns))
    shown = [*norms[::every]]
    at = [*steps[::every]]
    names = list(norms[0])
    left = min(330.0, 14 + max(text_width(name, 9) for name in names))
    wide = (_WIDTH - left - 8) / len(shown)
    height = _TOP + _ROW * len(names) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart heat" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" '
        f'role="img" aria-label="Norm of every group over time">'
    ]
    for row, name in enumerate(names):
        y = _TOP + _ROW * row
        parts.append(
            f'<text x="{left - 6:.1f}" y="{y + 8.5:.1f}" text-anchor="end" style="font-size:9px">{escape(name)}</text>'
        )
        values = [float(line.get(name, 0.0)) for line in shown]
        for begin, end, level in _runs(values):
            x, width = left + wide * begin, wide * (end - begin)
            fill = "fill:var(--es-red)" if level == 0 else f"fill:var(--es-blue);fill-opacity:{level / _LEVELS:.2f}"
            words = "zero" if level == 0 else f"{values[begin]:.3g}"
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{_ROW - 1:.0f}" style="{fill}">'
                f"<title>{escape(name)}, from step {at[begin]}: {words}</title></rect>"
            )
    last = max(at[-1], 1)
    for tick in ticks(0, last):
        x = left + (_WIDTH - left - 8) * tick / last
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 6:.0f}" text-anchor="middle">{tick:g}</text>')
    return "".join([*parts, "</svg>"])


def _runs(values: Sequence[float]) -> list[tuple[int, int, int]]:
    """Neighbours of one level as (begin, end, level); level 0 is exactly zero."""
    first = values[0] or max(*values, 1e-12)
    levels = [0 if v == 0.0 else max(1, min(_LEVELS, round(_LEVELS * v / first))) for v in values]
    runs: list[tuple[int, int, int]] = []
    for i, level in enumerate(levels):
        if runs and runs[-1][2] == level:
            runs[-1] = (runs[-1][0], i + 1, level)
        else:
            runs.append((i, i + 1, level))
    return runs
