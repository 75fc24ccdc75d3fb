"""Parameters that are frozen while a proximal optimizer has them: they hold still, and with them their groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.errors import TrainingError
from espalier.sparsify.prox import Runs


@dataclass(frozen=True, eq=False)
class Held:
    """``tensors``: the places of the frozen ones among all; ``at`` [elements]: of their elements in the flat vector;
    ``groups``, bool [groups]: those that are made of them.
    """

    tensors: tuple[int, ...]
    at: Tensor
    groups: Tensor

    @classmethod
    def of(cls, tensors: tuple[int, ...], parameters: Mapping[str, int], runs: Runs, groups: Sequence[str]) -> "Held":
        """From the names and sizes of all ``parameters`` and the groups' names. The host waits for the device.

        Raises :class:`TrainingError` where a part of a group only is frozen.
        """
        names, chosen = list(parameters), set(tensors)
        place = torch.repeat_interleave(torch.tensor(list(parameters.values()))).to(runs.length.device)
        still = torch.tensor([i in chosen for i in range(len(names))], device=place.device)[place]
        frozen, live = runs.sum(still.double()) > 0, runs.sum((~still).double()) > 0
        torn = (frozen & live).nonzero().flatten().tolist()
        if torn:
            own = runs.owner == torn[0]
            one, other = (names[int(place[own & side].min())] for side in (still, ~still))
            raise TrainingError(
                f"'{one}' is frozen (requires_grad=False), but '{other}', of the same group '{groups[torn[0]]}', is "
                f"not: a group is trained or holds still as a whole. Freeze '{other}' too, unfreeze '{one}', or make "
                "groups without it and a new optimizer."
            )
        return cls(tensors, still.nonzero().flatten(), ~live[: len(groups)])
