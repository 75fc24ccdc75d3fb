"""Two processes draw the same gates and reach the same groups (gloo, also under torchrun)."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import espalier
from espalier.sparsify import Gates, ProxSGD, SpaceGates, input_gates, layer_groups, space_groups


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
    return {"phi": gates.phi.detach(), "w": model[0].weight.detach(), "dormant": prox.dormant, **over_spaces(x, y)}


def over_spaces(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same on search spaces; the gates average all gradients themselves."""
    model = network()
    space = espalier.search_space(model, x, levels=("channel",))
    gates = SpaceGates(space, lam=1.0, examples=16, seed=3)
    opt = torch.optim.SGD([*model.parameters(), *gates.parameters()], lr=0.5)
    for _ in range(6):
        opt.zero_grad()
        gates.backward(lambda: cross_entropy(gates(x), y))
        opt.step()
    other = network()
    space = espalier.search_space(other, x, levels=("channel",))
    called = nn.parallel.DistributedDataParallel(other) if dist.is_initialized() else other
    prox = ProxSGD(space_groups(space), mu=0.1, lr=0.2)
    for _ in range(60):
        prox.zero_grad()
        mse_loss(called(x)[:, 0], x[:, 0]).backward()
        prox.step()
    gone = torch.zeros(len(space))
    gone[[space.position(name) for name in prox.solution().removed]] = 1
    return {"space phi": gates.phi.detach(), "space w": model[0].weight.detach(), "removed": gone}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(train(slice(rank, None, 2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    check(tmp_path)


def test_torchrun(tmp_path: Path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check(tmp_path)


def check(tmp_path: Path) -> None:
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = train(slice(None))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name].double(), value.double(), atol=1e-4), name
    assert 0 < int((alone["dormant"] > 0).sum()) < 12
    assert 0 < int(alone["removed"].sum()) < 12


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(train(slice(rank, None, 2)), f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()
