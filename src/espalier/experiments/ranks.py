"""The processes that train together: one alone, or those that torchrun started."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from espalier.errors import EspalierError

__all__ = ["Team", "join"]


@dataclass(frozen=True)
class Team:
    """This process's place among all, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network to call: with several ranks, gradients are averaged over them."""
        if self.world == 1:
            return network
        return DistributedDataParallel(network, device_ids=[self.device] if self.device.type == "cuda" else None)

    def total(self, *counts: float) -> tuple[float, ...]:
        """Sums over all ranks."""
        sums = torch.tensor(counts, dtype=torch.float64)
        if self.world > 1:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return tuple(sums.tolist())

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Part from the others."""
        if self.world > 1:
            dist.destroy_process_group()


def join(device: str = "cpu") -> Team:
    """Take part in what torchrun started, or be alone.

    >>> join()
    Team(device=device(type='cpu'), rank=0, world=1)

    Raises :class:`EspalierError` where the device is not there.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EspalierError(f"--device {device}: torch sees no CUDA device; take --device cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Team(torch.device(device))
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Team(chosen, dist.get_rank(), dist.get_world_size())
