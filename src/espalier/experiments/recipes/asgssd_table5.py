"""ASGSSD, Table 5: DARTS of 8 cells on the labelled part of STL-10."""

from dataclasses import replace

from espalier.experiments.config import Run
from espalier.experiments.recipe import Published, Recipe, smoke

_FULL = Run(
    "darts8",
    "stl10",
    epochs=300,
    lr=0.01,
    search=50 / 300,
    projection=50 / 300,
    cycles=(0.5, 0.5),
    weight_decay=3e-4,
    clip=5.0,
    validation=500,
    size=32,
    pad=12,
    flip=True,
    cutout=48,
)
_PAPER = (_FULL, replace(_FULL, method="h2spg", params=0.158))
_SHORT = tuple(replace(run, width=1 / 6, size=16, epochs=10, search=0.3, projection=0.3) for run in _PAPER)

RECIPES = (
    Recipe(
        name="asgssd-table5",
        title="DARTS, 8 cells, on STL-10",
        runs={"paper": _PAPER, "short": _SHORT, "smoke": tuple(smoke(run) for run in _PAPER)},
        label=lambda run: "DARTS (8 cells), baseline" if run.method == "full" else "DARTS (8 cells), H2SPG",
        published={
            "DARTS (8 cells), baseline": Published("74.6", "4.05", "614"),
            "DARTS (8 cells), H2SPG": Published("75.1", "0.64", "127"),
        },
        notes=(
            "The paper's FLOPs fit images averaged to 32 pixels; it does not say so.",
            "The budget is the paper's 0.64 M of 4.05 M parameters.",
        ),
    ),
)
