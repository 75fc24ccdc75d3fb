"""The search space of any network as one picture that can be read."""

import math
from collections.abc import Iterable

from espalier.report.condense import columns, condensed, depth
from espalier.report.draw import draw, draw_beside
from espalier.report.segment_figures import segment_figure
from espalier.space.search_space import SearchSpace

__all__ = ["draw_space"]

_DEEP = 24
_SMALL = 30


def draw_space(space: SearchSpace, removed: Iterable[str] = (), title: str = "Search space") -> str:
    """The segment graph as SVG text: candidates of one edge in one box, long networks in columns.

    >>> from torch import nn, randn
    >>> from espalier.space.search_space import search_space
    >>> draw_space(search_space(nn.Linear(4, 2), (randn(3, 4),)))[:4]
    '<svg'

    Small networks are drawn as they are. Structures are green; those in ``removed`` are dotted and red.
    :func:`espalier.report.draw.draw_segments` draws every segment of any network as a box of its own.
    """
    figure = segment_figure(space, removed, title)
    if len(figure.vertices) > _SMALL:
        figure = condensed(figure)
    parts = columns(figure, math.ceil(depth(figure) / _DEEP))
    return draw(parts[0]) if len(parts) == 1 else draw_beside(parts, title)
