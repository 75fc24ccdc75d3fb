"""espalier: train any PyTorch network once and get back the smaller network worth keeping."""

from espalier.api import prune
from espalier.construct import construct
from espalier.export import export_onnx, load, save
from espalier.space.budget import Budget
from espalier.space.search_space import SearchSpace, search_space
from espalier.space.solution import Solution
from espalier.sparsify.halfspace import DHSPG, H2SPG, HSPG, ProxSGPlus

__version__ = "0.1.0.dev0"

__all__ = [
    "DHSPG",
    "H2SPG",
    "HSPG",
    "Budget",
    "ProxSGPlus",
    "SearchSpace",
    "Solution",
    "construct",
    "export_onnx",
    "load",
    "prune",
    "save",
    "search_space",
]
