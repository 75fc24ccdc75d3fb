"""Invariant 7: under DistributedDataParallel, both ranks of H2SPG end with the groups and weights of one process."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import Wide
from torch import nn
from torch.nn.functional import cross_entropy

import espalier


def train(rows: slice, parallel: bool) -> dict[str, object]:
    """Sixteen steps on some rows of one batch; the mean loss over ranks is that of the whole batch."""
    torch.manual_seed(0)
    model = Wide().double()
    x, y = torch.randn(16, 6).double()[rows], torch.randint(0, 3, (16,))[rows]
    space = espalier.search_space(model, (x,))
    opt = espalier.H2SPG(
        space, budget=espalier.Budget(params=0.6), lr=0.05, momentum=0.9, warmup_steps=5, projection_steps=8
    )
    called = nn.parallel.DistributedDataParallel(model) if parallel else model
    for _ in range(16):
        opt.zero_grad()
        cross_entropy(called(x), y).backward()
        opt.step()
    return {"removed": opt.solution().removed, "weights": model.state_dict()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(train(slice(rank, None, 2), parallel=True), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    alone = train(slice(None), parallel=False)
    for rank in ranks:
        assert rank["removed"] == alone["removed"]
        for name, value in alone["weights"].items():  # type: ignore[attr-defined]
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-9, atol=1e-12)
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name])
