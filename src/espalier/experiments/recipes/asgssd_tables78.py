"""ASGSSD, Tables 7 and 8: how long the search phase is, and its learning rate."""

from dataclasses import replace

from espalier.experiments.config import Run
from espalier.experiments.recipe import Published, Recipe, smoke
from espalier.experiments.recipes.asgssd_table4 import FULL, SMALL

_LENGTHS = (10, 30, 50, 70, 90)
_RATES = (1e-1, 1e-2, 1e-3)
_AFTER = 250  # epochs once the search is over


def _searched(base: Run, epochs: int, seed: int) -> Run:
    share = epochs / (epochs + _AFTER)
    total = {"epochs": epochs + _AFTER, "search": share, "projection": 50 / (epochs + _AFTER)}
    return replace(base, method="h2spg", sparsity=0.5, seed=seed, cycles=(share, 1 - share), **total)


def _searched_short(length: int, seed: int) -> Run:
    """A fiftieth of the paper's search, and four epochs after it."""
    epochs = 4 + length / 50
    share = length / 50 / epochs
    run = replace(SMALL, method="h2spg", sparsity=0.5, seed=seed, shared=False)
    return replace(run, epochs=epochs, search=share, projection=1 / epochs, cycles=(share, 1 - share))


def _epochs(run: Run) -> str:
    after = _AFTER if run.epochs > _AFTER else 4
    scale = 1 if run.epochs > _AFTER else 50
    return f"{round((run.epochs - after) * scale)} epochs"


_LONG = tuple(_searched(FULL, length, seed) for length in _LENGTHS for seed in range(5))
_BRIEF = tuple(_searched_short(length, seed) for length in _LENGTHS for seed in range(3))
_STEEP = tuple(
    replace(FULL, method="h2spg", sparsity=0.5, search_lr=rate, seed=seed) for rate in _RATES for seed in range(5)
)
_STEEP_SHORT = tuple(
    replace(SMALL, method="h2spg", sparsity=0.5, search_lr=rate, seed=seed, shared=False)
    for rate in _RATES
    for seed in range(3)
)

RECIPES = (
    Recipe(
        name="asgssd-table7",
        title="RegNet-800M on CIFAR-10, H2SPG at 0.5: length of the search phase",
        runs={"paper": _LONG, "short": _BRIEF, "smoke": (smoke(_BRIEF[0]),)},
        label=_epochs,
        published={
            "10 epochs": Published("93.88 ± 0.60"),
            "30 epochs": Published("94.24 ± 0.32"),
            "50 epochs": Published("94.61 ± 0.19"),
            "70 epochs": Published("94.72 ± 0.15"),
            "90 epochs": Published("94.71 ± 0.13"),
        },
        notes=("At short, an epoch of the search phase is a fiftieth of an epoch; the rows keep the paper's names.",),
        axis="search",
        draw=False,
    ),
    Recipe(
        name="asgssd-table8",
        title="RegNet-800M on CIFAR-10, H2SPG at 0.5: learning rate of the search phase",
        runs={"paper": _STEEP, "short": _STEEP_SHORT, "smoke": (smoke(_STEEP_SHORT[1]),)},
        label=lambda run: f"rate {run.search_lr:g}",
        published={
            "rate 0.1": Published("94.61 ± 0.19"),
            "rate 0.01": Published("94.34 ± 0.25"),
            "rate 0.001": Published("93.90 ± 0.41"),
        },
        axis="search_lr",
        draw=False,
    ),
)
