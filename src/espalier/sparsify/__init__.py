"""Drive structures to zero while training."""

from espalier.sparsify.bisect import bisect_mu, fit_to_target, kept_share
from espalier.sparsify.gates import Gates
from espalier.sparsify.grouping import Grouping, layer_groups, named_groups, space_groups
from espalier.sparsify.halfspace import DHSPG, H2SPG, HSPG, ProxSGPlus
from espalier.sparsify.over_open import over_what_stays
from espalier.sparsify.probability import HardSigmoid, Sigmoid
from espalier.sparsify.proxsgd import PAPER, ProxSGD
from espalier.sparsify.rmda import RAMDA, RMDA
from espalier.sparsify.schedule import PowerDecay
from espalier.sparsify.sites import Site, input_gates, output_gates
from espalier.sparsify.sliced import sliced
from espalier.sparsify.space_gates import SpaceGates

__all__ = [
    "DHSPG",
    "H2SPG",
    "HSPG",
    "PAPER",
    "RAMDA",
    "RMDA",
    "Gates",
    "Grouping",
    "HardSigmoid",
    "PowerDecay",
    "ProxSGD",
    "ProxSGPlus",
    "Sigmoid",
    "Site",
    "SpaceGates",
    "bisect_mu",
    "fit_to_target",
    "input_gates",
    "kept_share",
    "layer_groups",
    "named_groups",
    "output_gates",
    "over_what_stays",
    "sliced",
    "space_groups",
]
