"""A score per structure; higher is kept.

A saliency is a function of (space, state) that returns one float tensor [number of structures]. One file each;
every function that such a file defines under the file's own name is found here by that name.
"""

import importlib
import pkgutil

from espalier.errors import TrainingError
from espalier.saliency.cosine_magnitude import cosine_magnitude
from espalier.saliency.magnitude import magnitude
from espalier.saliency.state import Saliency, State

_found = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
SALIENCIES: dict[str, Saliency] = {name: getattr(m, name) for name, m in _found.items() if hasattr(m, name)}


def named(saliency: Saliency | str) -> Saliency:
    """The saliency of that name in :data:`SALIENCIES`; a function is returned as it is."""
    if not isinstance(saliency, str):
        return saliency
    if saliency not in SALIENCIES:
        raise TrainingError(f"no saliency is called '{saliency}': there are {', '.join(sorted(SALIENCIES))}.")
    return SALIENCIES[saliency]


__all__ = ["SALIENCIES", "Saliency", "State", "cosine_magnitude", "magnitude", "named"]
