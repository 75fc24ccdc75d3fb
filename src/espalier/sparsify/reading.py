"""What must be known about a solution read off the groups: norms that change with it, ranks that differ."""

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution


def norms_over_what_stays(space: SearchSpace, solution: Solution) -> list[str]:
    """Paths of the norms (and names of other averages) over an axis that loses something.

    >>> from torch import nn
    >>> from espalier import search_space
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    >>> space = search_space(net, torch.randn(3, 4), levels=("channel",))
    >>> norms_over_what_stays(space, space.solution(["0[0]"]))
    ['1']
    """
    narrowing = space.narrowing(solution.removed)
    found = [
        str(node.target) if node.op == "call_module" else node.name
        for node, dims in narrowing.axes.statistics.items()
        if set(dims) & set(narrowing.of(node.all_input_nodes[0]))
    ]
    return list(dict.fromkeys(found))


def warn_of_norms(space: SearchSpace, solution: Solution) -> None:
    """Warn where the sub-network equals the masked network, but not the full one with zeros in it."""
    norms = norms_over_what_stays(space, solution)
    if norms:
        warnings.warn(
            f"'{norms[0]}' ({len(norms)} such in all) takes its statistics over channels of which some go: the "
            "sub-network equals space.masked(solution), where they are over what stays, not the snapped model, where "
            "the zeros count. Judge and fine-tune space.masked(solution) or the sub-network; or use the levels "
            "'head' and 'segment', or exclude those channels with keep=.",
            stacklevel=3,
        )


def first_difference(names: Sequence[str], *per_group: Tensor) -> str | None:
    """The first group in which the ranks' numbers differ; None where all agree or there is one rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    mine = torch.stack([t.double() for t in per_group])
    both = torch.stack([mine, -mine])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    apart = ~(both[0] == -both[1]).all(0)
    at: list[int] = apart.nonzero().flatten().tolist()
    return names[at[0]] if at else None
