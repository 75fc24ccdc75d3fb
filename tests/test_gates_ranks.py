"""Gates on two ranks: what is not finite on one is refused on both; draws stay equal after uneven batches (gloo)."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.errors import TrainingError
from espalier.sparsify import Gates, input_gates

NAN = float("nan")


def layer_gates(**options) -> tuple[Gates, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    gates = Gates(model, [input_gates(model, "2", producer="0")], lam=0.3, examples=10, seed=1, **options)
    return gates, torch.randn(12, 6), torch.randint(3, (12,))


def one_is_not_finite(rank: int) -> list[str]:
    """What each rank is told, where rank 0 alone has a bad loss: in a pass, the other, the gradient, nowhere."""
    told = []
    for bad in (1, 2, 3, 4):
        gates, x, y = layer_gates()
        calls: list[int] = []

        def loss(gates=gates, x=x, y=y, calls=calls, bad=bad) -> Tensor:
            calls.append(0)
            value, bias = cross_entropy(gates(x), y), gates.model[0].bias[0]
            if rank == 0 and bad == 3:
                return value + (bias - bias.detach()).abs().sqrt()
            return value * (NAN if rank == 0 and len(calls) == bad else 1.0)

        try:
            gates.backward(loss)
            told.append("fine")
        except TrainingError as error:
            told.append(str(error))
    return told


def uneven(rank: int) -> list[Tensor]:
    """A draw per example, and one for the batch, with a short batch on rank 1 in the middle."""
    found = []
    for per_sample in (True, False):
        gates, x, y = layer_gates(per_sample=per_sample)
        opt = torch.optim.SGD([*gates.model.parameters(), *gates.parameters()], lr=0.3)
        for step in range(3):
            n = 5 if rank == 1 and step == 1 else 12

            def loss(gates=gates, n=n, x=x, y=y, per_sample=per_sample) -> Tensor:
                assert gates._z is not None
                found.append((gates._z[:5] if per_sample else gates._z).clone())
                return cross_entropy(gates(x[:n]), y[:n], reduction="none" if per_sample else "mean")

            opt.zero_grad()
            gates.backward(loss, batch_size=n)
            opt.step()
        found.append(gates.phi.detach())
    return found


def worker(rank: int, folder: str, what: Callable[[int], list]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(what(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(what: Callable[[int], list], folder: Path) -> tuple[list, list]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(worker, args=(str(folder), what), nprocs=2, start_method="fork")
    return torch.load(folder / "0.pt"), torch.load(folder / "1.pt")


def test_what_is_not_finite_on_one_rank_is_refused_on_all(tmp_path):
    """Neither is left waiting for the other."""
    first, second = on_two_ranks(one_is_not_finite, tmp_path)
    gradient = "the gradient of '0.bias' is not finite"
    for told, wanted in ((first, "the loss is nan"), (second, "the loss of another rank is not finite")):
        assert [t.partition(":")[0] for t in told] == [wanted, wanted, gradient, "fine"]


def test_draws_stay_equal_after_uneven_batches(tmp_path):
    first, second = on_two_ranks(uneven, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_draws_differ_from_step_to_step():
    found = uneven(0)
    for first in (0, 7):  # per example, per batch: two passes of three steps, and φ
        assert not torch.equal(found[first], found[first + 2])
