"""How each operator acts when some of what it reads is constant or narrowed.

One file per kind of operator. A rule has the signature ``rule(build, node, values) -> Value | None``; None
means that it cannot take the case, and the constants are then put back (always exact, never smaller).
Importing this package registers every rule in it.
"""

import importlib
import pkgutil

from espalier.rules.value import RULES, Constant, Narrowed, Value, rule

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["RULES", "Constant", "Narrowed", "Value", "rule"]
