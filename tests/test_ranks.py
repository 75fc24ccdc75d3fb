"""Two processes draw the same gates and reach the same groups (gloo)."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from espalier.sparsify import Gates, ProxSGD, input_gates, layer_groups


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)).double()


def data():
    make = torch.Generator().manual_seed(1)
    return torch.randn(16, 6, generator=make).double(), torch.randint(2, (16,), generator=make)


def average(model: nn.Module) -> None:
    """What DistributedDataParallel does with gradients."""
    if dist.is_initialized():
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def train(rows: slice) -> dict[str, torch.Tensor]:
    """Gates for four steps, then ProxSGD, on some rows of each batch."""
    x, y = (t[rows] for t in data())
    model = network()
    gates = Gates(model, [input_gates(model, "2", producer="0")], lam=0.1, examples=16, seed=7)
    opt = torch.optim.SGD([*model.parameters(), *gates.parameters()], lr=0.5)
    for _ in range(4):
        opt.zero_grad()
        gates.backward(lambda: cross_entropy(gates(x), y))
        average(model)
        opt.step()
    other = network()
    prox = ProxSGD(layer_groups(other, ["0"]), mu=0.1, lr=0.2)
    for _ in range(60):
        prox.zero_grad()
        mse_loss(other(x)[:, 0], x[:, 0]).backward()
        average(other)
        prox.step()
    return {"phi": gates.phi.detach(), "w": model[0].weight.detach(), "dormant": prox.dormant}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(train(slice(rank, None, 2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = train(slice(None))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name].double(), value.double(), atol=1e-4), name
    assert 0 < int((alone["dormant"] > 0).sum()) < 12
