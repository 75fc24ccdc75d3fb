"""Drive structures to zero while training."""

from espalier.sparsify.halfspace import DHSPG, H2SPG

__all__ = ["DHSPG", "H2SPG"]
