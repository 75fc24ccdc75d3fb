"""Drive structures to zero while training."""

from espalier.sparsify.gates import Gates
from espalier.sparsify.halfspace import DHSPG, H2SPG
from espalier.sparsify.probability import HardSigmoid, Sigmoid
from espalier.sparsify.sites import input_gates, output_gates, structure_gates

__all__ = [
    "DHSPG",
    "H2SPG",
    "Gates",
    "HardSigmoid",
    "Sigmoid",
    "input_gates",
    "output_gates",
    "structure_gates",
]
