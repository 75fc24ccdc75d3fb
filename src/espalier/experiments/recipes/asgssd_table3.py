"""ASGSSD, Table 3: DARTS of 14 cells on ImageNet."""

from dataclasses import replace

from espalier.experiments.config import Run
from espalier.experiments.recipe import Published, Recipe, smoke

_FULL = Run(
    "darts14",
    "imagenet",
    epochs=250,
    batch_size=128,
    lr=0.01,
    search=50 / 250,
    projection=50 / 250,
    cycles=(0.5, 0.5),
    weight_decay=3e-5,
    clip=5.0,
    crop=224,
    validation=50_000,
    flip=True,
    construct_early=True,
)
_PAPER = (replace(_FULL, method="h2spg", params=0.192),)
_SHORT = (replace(_PAPER[0], width=0.1, size=56, images=20_000, epochs=1, batch_size=64, search=0.3, projection=0.3),)

RECIPES = (
    Recipe(
        name="asgssd-table3",
        title="DARTS, 14 cells, on ImageNet",
        runs={"paper": _PAPER, "short": _SHORT, "smoke": tuple(smoke(run) for run in _PAPER)},
        label=lambda run: "DARTS (14 cells), H2SPG",
        published={"DARTS (14 cells), H2SPG": Published("75.9 (top-5 92.8)", "4.9", "552")},
        notes=(
            "The budget is the paper's 4.9 M of our 25.5 M parameters.",
            "As in the paper, the sub-network is built as soon as its structures are at zero, and trained on.",
        ),
    ),
)
