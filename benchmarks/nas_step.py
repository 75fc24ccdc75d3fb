"""The optimizer's share of one step of a DARTS supernet: ProxSGD over flat vectors, and a loop over tensors.

    python benchmarks/nas_step.py [--channels 16 --cells 8 --batch 8] [--device cpu] [--drop 0.7]

The loop does what the published code does, one tensor after the other and one number read back per tensor;
both are first checked to give the same weights. ``--drop`` then takes that fraction of the groups out and
measures the step again.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from espalier.nas.spaces import space
from espalier.nas.supernet import alive_groups, operation_groups, take_out
from espalier.sparsify import ProxSGD
from espalier.sparsify.grouping import Grouping

warnings.simplefilter("ignore")


class Loop:
    """ProxSGD, tensor by tensor."""

    def __init__(self, grouping: Grouping, mu: float, lr: float, rho: float):
        own = dict(grouping.model.named_parameters())
        self.groups: list[list[torch.nn.Parameter]] = [[] for _ in grouping.names]
        for name, owner in grouping.owner.items():
            self.groups[int(owner)].append(own[name])
        self.rest = [p for name, p in own.items() if name not in grouping.owner]
        self.size = grouping.size.tolist()
        self.v = {p: torch.zeros_like(p) for p in own.values()}
        self.mu, self.lr, self.rho = mu, lr, rho

    @torch.no_grad()
    def step(self) -> None:
        for group, size in zip(self.groups, self.size, strict=True):
            square = 0.0
            for p in group:
                assert p.grad is not None
                self.v[p].mul_(1.0 - self.rho).add_(p.grad, alpha=self.rho)
                square += float((p - self.v[p]).norm()) ** 2
            factor = max(0.0, 1.0 - self.mu / size**0.5 / square**0.5) if square > 0.0 else 1.0
            for p in group:
                p.add_(factor * (p - self.v[p]) - p, alpha=self.lr)
        for p in self.rest:
            assert p.grad is not None
            self.v[p].mul_(1.0 - self.rho).add_(p.grad, alpha=self.rho)
            p.add_(self.v[p], alpha=-self.lr)


def seconds(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def median(call: Callable[[], object], rounds: int, device: str) -> float:
    """Milliseconds."""
    times = []
    for i in range(rounds + 2):
        start = seconds(device)
        call()
        if i >= 2:
            times.append(1e3 * (seconds(device) - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--drop", type=float, default=0.7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, 32, 32, device=args.device)
    labels = torch.randint(10, (args.batch,), device=args.device)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(space("darts").supernet(args.channels, args.cells).to(args.device))

    def passes() -> None:
        models[0].zero_grad()
        cross_entropy(models[0](images), labels).backward()

    passes()
    for ours, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        other.grad = None if ours.grad is None else ours.grad.clone()
    flat = ProxSGD(operation_groups(models[0]), mu=60.0, lr=1e-3, rho=0.8, normalize="div")
    loop = Loop(operation_groups(models[1]), mu=60.0, lr=1e-3, rho=0.8)
    for _ in range(3):
        flat.step()
        loop.step()
    for ours, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, other)
    tensors, groups = len(list(models[0].parameters())), len(flat.grouping)
    print(f"torch {torch.__version__}, {args.device}, 1 thread; {args.cells} cells, {args.channels} channels,")
    print(f"{tensors} tensors, {groups} groups, batches of {args.batch}")
    network = median(passes, args.rounds, args.device)
    print(f"{'forward and backward':28} {network:9.1f} ms")
    for name, optimizer in (("ProxSGD, flat", flat), ("loop over tensors", loop)):
        own = median(optimizer.step, 3 * args.rounds, args.device)
        print(f"{name:28} {own:9.1f} ms, {100 * own / (network + own):5.1f} % of the step")
    if args.drop:
        names = alive_groups(models[0])
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
        take_out(models[0], [names[i] for i in order[: int(args.drop * len(names))]])
        passes()
        small = ProxSGD(operation_groups(models[0]), mu=60.0, lr=1e-3, rho=0.8, normalize="div")
        rest = median(passes, args.rounds, args.device)
        own = median(small.step, 3 * args.rounds, args.device)
        share = 100 * args.drop
        print(f"with {share:.0f} % of the groups taken out: {rest:.1f} ms and {own:.1f} ms", end="; ")
        print(f"{(network + median(flat.step, 5, args.device)) / (rest + own):.2f} x as fast")


if __name__ == "__main__":
    main()
