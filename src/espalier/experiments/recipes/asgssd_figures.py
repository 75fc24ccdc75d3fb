"""ASGSSD, figures 2 to 9: search spaces, redundant structures and sub-networks, drawn after one training each."""

from dataclasses import replace

from espalier.experiments.config import Run
from espalier.experiments.recipe import Recipe, smoke
from espalier.experiments.recipes.asgssd_table4 import FULL, SMALL

_PAPER = (
    Run("demonet", "fashion-mnist", method="h2spg", params=0.55, flip=True),
    Run("stacked-unets", "svhn", method="h2spg", params=0.46, pad=4),
    Run("darts8", "stl10", method="h2spg", params=0.158, lr=0.01, validation=500, size=32, clip=5.0, cycles=(0.5, 0.5)),
    replace(FULL, network="super-resnet", method="h2spg", params=0.225),
    Run("darts14", "imagenet", method="h2spg", params=0.192, batch_size=128, lr=0.01, crop=224, flip=True, clip=5.0),
    replace(FULL, method="h2spg", sparsity=0.5),
)
_SHORT = (
    replace(_PAPER[0], width=0.25, epochs=2),
    replace(_PAPER[1], width=0.25, epochs=1, size=16),
    replace(_PAPER[2], network="darts8-2nodes", width=1 / 6, epochs=4, size=16),
    replace(SMALL, network="super-resnet", method="h2spg", params=0.225, width=0.1, epochs=1, shared=False),
    replace(_PAPER[4], width=0.1, size=56, images=10_000, epochs=1, batch_size=64),
    replace(SMALL, method="h2spg", sparsity=0.5, epochs=2, shared=False),
)

RECIPES = (
    Recipe(
        name="asgssd-figures",
        title="Figures 2 to 9: search spaces and what H2SPG finds redundant",
        runs={"paper": _PAPER, "short": _SHORT, "smoke": (smoke(_PAPER[0]), smoke(_PAPER[5]))},
        label=lambda run: f"{run.network}, {run.dataset}",
        published={},
        notes=("The drawings are SVG files beside the results; the networks' own are in docs/networks.md.",),
    ),
)
