"""A score per structure; higher is kept.

A saliency is a function of (space, state) that returns one float tensor [number of structures]. There is one file
for each. Some are made by a function first, because they look at data (``zico(batches)``) or have settings
(``random(seed=1)``). Training-free proxies are meant for a network before training, and cost a run of the network
for every structure: take them once, with ``score_every=warmup_steps``.

``SALIENCIES`` holds, by name, every saliency of this package that needs nothing to be given.
"""

import importlib
import inspect
import pkgutil

from espalier.errors import TrainingError
from espalier.saliency.balanced import balanced
from espalier.saliency.bn_scale import bn_scale
from espalier.saliency.cosine_magnitude import cosine_magnitude
from espalier.saliency.group_norm import group_norm
from espalier.saliency.magnitude import magnitude
from espalier.saliency.naswot import naswot
from espalier.saliency.ntk import ntk
from espalier.saliency.random import random
from espalier.saliency.relative import relative
from espalier.saliency.state import Saliency, State, average, worth
from espalier.saliency.synflow import synflow
from espalier.saliency.taylor import taylor
from espalier.saliency.zen_score import zen_score
from espalier.saliency.zico import zico

SALIENCIES: dict[str, Saliency] = {}
_NEED_DATA: dict[str, str] = {}


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        found = getattr(importlib.import_module(f"{__name__}.{module.name}"), module.name, None)
        if found is None or module.name in ("fall", "sums", "state"):
            continue
        parameters = inspect.signature(found).parameters
        if next(iter(parameters), "") == "space":
            SALIENCIES[module.name] = found
        elif all(p.default is not p.empty for p in parameters.values()):
            SALIENCIES[module.name] = found()
        else:
            _NEED_DATA[module.name] = f"{module.name}{inspect.signature(found)}"


def named(saliency: Saliency | str) -> Saliency:
    """The saliency of that name in :data:`SALIENCIES`; a function is returned as it is.

    >>> named("taylor") is taylor, named(magnitude) is magnitude
    (True, True)

    Raises :class:`TrainingError` for an unknown name, and for one that needs data.
    """
    if not isinstance(saliency, str):
        return saliency
    if saliency in _NEED_DATA:
        raise TrainingError(
            f"'{saliency}' looks at data: give saliency=espalier.saliency.{saliency}(...) instead of its name."
        )
    if saliency not in SALIENCIES:
        raise TrainingError(f"no saliency is called '{saliency}': there are {', '.join(sorted(SALIENCIES))}.")
    return SALIENCIES[saliency]


_discover()

__all__ = [
    "SALIENCIES",
    "Saliency",
    "State",
    "average",
    "balanced",
    "bn_scale",
    "cosine_magnitude",
    "group_norm",
    "magnitude",
    "named",
    "naswot",
    "ntk",
    "random",
    "relative",
    "synflow",
    "taylor",
    "worth",
    "zen_score",
    "zico",
]
