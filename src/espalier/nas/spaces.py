"""The published spaces: DARTS, S1 to S4 of RobustDARTS (Zela et al., 2020), and NAS-Bench-201."""

from espalier.errors import SpaceError
from espalier.models.darts import OPERATIONS
from espalier.nas.space import CellSpace, uniform

_SHORT = {
    "skip": "skip",
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "sep3": "sep_conv_3x3",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}

_S1_NORMAL = (
    "skip/dil3 skip/dil5 "
    "skip/dil5 skip/sep3 skip/dil3 "
    "max/skip skip/sep3 skip/sep3 skip/dil3 "
    "skip/sep3 max/skip skip/dil3 dil3/dil5 dil3/dil5"
)
_S1_REDUCE = (
    "max/avg max/dil3 "
    "max/avg max/avg skip/dil5 "
    "max/avg max/sep3 skip/dil3 skip/dil5 "
    "max/avg max/avg skip/dil5 skip/dil5 skip/dil5"
)


def _edges(text: str) -> dict[str, tuple[str, ...]]:
    """Two operations per edge, the edges node by node."""
    names = [f"{source}_{node}" for node in range(2, 6) for source in range(node)]
    return {
        edge: tuple(_SHORT[name] for name in pair.split("/")) for edge, pair in zip(names, text.split(), strict=True)
    }


SPACES: dict[str, CellSpace] = {
    "darts": uniform("darts", ("none", *OPERATIONS)),
    "s1": CellSpace("s1", {"normal": _edges(_S1_NORMAL), "reduce": _edges(_S1_REDUCE)}),
    "s2": uniform("s2", ("skip", "sep_conv_3x3")),
    "s3": uniform("s3", ("none", "skip", "sep_conv_3x3")),
    "s4": uniform("s4", ("noise", "sep_conv_3x3")),
    "nas-bench-201": uniform(
        "nas-bench-201", ("none", "skip", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"), 3, "nas-bench-201"
    ),
}
"""Every space by name; a space of your own can be added here, or be used without a name."""


def space(name: str) -> CellSpace:
    """One of SPACES.

    >>> space("s4").edges("reduce")["4_5"]
    ('noise', 'sep_conv_3x3')

    Raises :class:`SpaceError` for another name.
    """
    if name not in SPACES:
        raise SpaceError(f"no space is called '{name}'; there are {', '.join(SPACES)}.")
    return SPACES[name]
