"""Ranks whose gradients are not averaged drift apart: check_ranks says so."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import mse_loss

from espalier.errors import TrainingError
from espalier.sparsify import RMDA, ProxSGD, layer_groups


def trained(kind, averaged: bool, rank: int):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    called = nn.parallel.DistributedDataParallel(model) if averaged else model
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))[rank::2]
    opt = kind(layer_groups(model, ["0"]), mu=0.05, lr=0.2)
    for _ in range(20):
        opt.zero_grad()
        mse_loss(called(x)[:, 0], x[:, 0]).backward()
        opt.step()
    return opt


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = []
    for kind in (ProxSGD, RMDA):
        trained(kind, True, rank).check_ranks()
        try:
            trained(kind, False, rank).check_ranks()
        except TrainingError as error:
            told.append(str(error))
    torch.save(told, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_that_drift_apart_are_found(tmp_path: Path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        told = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(told) == 2
        assert all("first in group '0[0]'" in message and "DistributedDataParallel" in message for message in told)
    trained(ProxSGD, False, 0).check_ranks()  # one process: nothing to compare
