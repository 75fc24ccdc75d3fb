"""A recipe: the runs behind one table or figure, at three scales, and what the paper reports."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from espalier.errors import EspalierError
from espalier.experiments import recipes
from espalier.experiments.config import Run

__all__ = ["Published", "Recipe", "Scale", "all_recipes", "cuts", "find", "smoke"]

Scale = Literal["smoke", "short", "paper"]


@dataclass(frozen=True)
class Published:
    """One row as published: top-1 accuracy in per cent, parameters in millions, FLOPs in millions."""

    accuracy: str = ""
    params: str = ""
    flops: str = ""


@dataclass(frozen=True)
class Recipe:
    """One table or figure.

    Fields:
        name: what ``espalier reproduce`` calls it.
        title: one line.
        runs: the trainings of each scale, in the order in which they are done.
        label: the row of a run; runs that differ in their seed share one.
        published: the paper's rows, by label.
        notes: what the paper does not say, or what differs here, in sentences.
        axis: what the plot shows the accuracy against: "params", "sparsity", "search" or "search_lr".
        draw: whether the search spaces are drawn.
    """

    name: str
    title: str
    runs: Mapping[str, tuple[Run, ...]]
    label: Callable[[Run], str]
    published: Mapping[str, Published]
    notes: tuple[str, ...] = ()
    axis: str = "params"
    draw: bool = True


def all_recipes() -> dict[str, Recipe]:
    """Every module of ``experiments.recipes`` has one or several.

    >>> "asgssd-table1" in all_recipes()
    True
    """
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(recipes.__path__):
        loaded = importlib.import_module(f"{recipes.__name__}.{module.name}")
        found |= {recipe.name: recipe for recipe in loaded.RECIPES}
    return found


def find(name: str) -> Recipe:
    """The recipe of this name. Raises :class:`EspalierError`, which lists them all."""
    known = all_recipes()
    if name not in known:
        raise EspalierError(f"no recipe is called {name!r}; there are {', '.join(known)}.")
    return known[name]


def cuts(recipe: Recipe, scale: str) -> dict[str, tuple[str, str]]:
    """What a scale has less of than the paper: field → (the paper's values, this scale's)."""
    found: dict[str, tuple[str, str]] = {}
    for name in (f.name for f in fields(Run)):
        there, here = (_values(recipe.runs[s], name) for s in ("paper", scale))
        if there != here:
            found[name] = (there, here)
    there, here = len(recipe.runs["paper"]), len(recipe.runs[scale])
    return found | ({"trainings": (str(there), str(here))} if there != here else {})


def _values(runs: tuple[Run, ...], name: str) -> str:
    values = dict.fromkeys(getattr(run, name) for run in runs)
    return ", ".join("all" if value is None and name == "images" else str(value) for value in values)


# what stands for each network in smoke runs: name, width, side of the images
_TINY = {
    "demonet": ("demonet", 0.1, 14),
    "stacked-unets": ("stacked-unets", 0.1, 16),
    "super-resnet": ("super-resnet-3blocks", 0.1, 8),
    "darts8": ("darts3-1node", 0.1, 8),
    "darts14": ("darts3-1node", 0.1, 8),
    "mobile": ("mobile-4blocks", 0.25, 16),
    "regnet-800m": ("regnet-200m", 0.125, 8),
}


def smoke(run: Run) -> Run:
    """The same run in a second or two: made-up images, a small network, a few steps."""
    network, width, size = _TINY[run.network]
    return replace(
        run,
        network=network,
        width=width,
        size=size,
        crop=0,
        stand_in=True,
        params=None if run.params is None else max(run.params, 0.6),
        images=96,
        epochs=2,
        batch_size=24,
        lr=0.02,
        watched=2,
        decay=0.0,
        cycles=(1.0,),
        search=0.4,
        projection=0.3,
    )
