"""A score per structure; higher is kept.

A saliency is a function of (space, state) that returns one float tensor [number of structures]. One file each.
"""

from espalier.saliency.cosine_magnitude import cosine_magnitude
from espalier.saliency.magnitude import magnitude
from espalier.saliency.state import Saliency, State

__all__ = ["Saliency", "State", "cosine_magnitude", "magnitude"]
