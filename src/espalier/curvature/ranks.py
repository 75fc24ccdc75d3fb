"""The rows of A shared out over processes, and brought together again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist

from espalier.curvature.watch import agreed


def world() -> tuple[int, int]:
    """This process and how many there are; (0, 1) without torch.distributed.

    >>> world()
    (0, 1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def rows_of(n: int, rank: int, ranks: int) -> tuple[int, int]:
    """The rows first … last of n that a rank computes.

    >>> [rows_of(5, rank, 2) for rank in (0, 1)]
    [(0, 2), (2, 5)]
    """
    return rank * n // ranks, (rank + 1) * n // ranks


def in_turn(make: Callable[[], Tensor], join: Callable[[], Tensor]) -> Tensor:
    """Rank 0 makes something that all share (a file), the others join once it is there."""
    rank, _ = world()
    with agreed():
        made = make() if rank == 0 else None
    with agreed():
        return join() if made is None else made


def meet() -> None:
    """Wait until every rank is here."""
    if world()[1] > 1:
        dist.barrier()


def everywhere(true: bool) -> bool:
    """Whether it is true on every rank.

    >>> everywhere(True)
    True
    """
    if world()[1] == 1:
        return true
    share = torch.tensor([float(true)], dtype=torch.float64)
    dist.all_reduce(share, dist.ReduceOp.MIN)
    return bool(share)


def gather(rows: Tensor, n: int) -> Tensor:
    """All n rows on every rank, from each rank's own; bit for bit the same everywhere."""
    rank, ranks = world()
    if ranks == 1:
        return rows
    whole = torch.empty(n, rows.shape[1], dtype=rows.dtype)
    first, last = rows_of(n, rank, ranks)
    whole[first:last] = rows
    for source in range(ranks):
        first, last = rows_of(n, source, ranks)
        if last > first:
            dist.broadcast(whole[first:last].view(torch.uint8), source)  # bytes: any type, any backend
    return whole


def mean(total: float, count: int) -> float:
    """The mean of what all ranks have summed."""
    sums = torch.tensor([total, float(count)], dtype=torch.float64)
    if world()[1] > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1].clamp_min(1))
