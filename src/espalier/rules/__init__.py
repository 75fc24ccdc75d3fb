"""How each operator couples axes, and how it acts on what is constant or narrowed.

One file per kind of operator, with both halves. ``@couples`` (:mod:`espalier.graph.axes`) says which axes of what an
operator reads and returns are one. A ``@rule`` has the signature ``rule(build, node, values) -> Value | None``; None
means that it cannot take the case, and the constants are then put back (always exact, never smaller).
Importing this package registers every rule in it.
"""

import importlib
import pkgutil

from espalier.rules.value import RULES, Constant, Kept, Narrowed, Value, rule

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["RULES", "Constant", "Kept", "Narrowed", "Value", "rule"]
