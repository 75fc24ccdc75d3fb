"""Milliseconds of one optimizer step over the DARTS supernet: ProxSGD, RMDA, RAMDA, the loop over groups, and
SGD, interleaved.

    python benchmarks/proxsgd_step.py [--threads 1] [--rounds 30]
"""

import argparse
import statistics
import time
import warnings

import torch

from espalier.models import DARTS
from espalier.sparsify import RAMDA, RMDA, ProxSGD, named_groups
from espalier.sparsify.grouping import Grouping

warnings.simplefilter("ignore")


def operations(model: torch.nn.Module) -> Grouping:
    """One group per operation on an edge of a cell that has parameters."""
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if "edges" in parts:
            groups.setdefault(".".join(parts[: parts.index("edges") + 3]), []).append(name)
    return named_groups(model, groups)


class Loop:
    """ProxSGD as a loop over groups and their tensors, as published code has it."""

    def __init__(self, grouping: Grouping, mu: float, lr: float, rho: float):
        own = dict(grouping.model.named_parameters())
        self.groups: list[list[torch.nn.Parameter]] = [[] for _ in grouping.names]
        for name, owner in grouping.owner.items():
            self.groups[int(owner)].append(own[name])
        self.rest = [p for name, p in own.items() if name not in grouping.owner]
        self.v = {p: torch.zeros_like(p) for p in own.values()}
        self.mu, self.lr, self.rho = mu, lr, rho

    @torch.no_grad()
    def step(self) -> None:
        for group, mu in [*((g, self.mu) for g in self.groups), *(([p], 0.0) for p in self.rest)]:
            for p in group:
                assert p.grad is not None
                self.v[p].mul_(1 - self.rho).add_(p.grad, alpha=self.rho)
            b = [p - self.v[p] for p in group]
            norm = torch.stack([x.norm() for x in b]).norm().item()
            factor = max(0.0, 1.0 - mu / norm) if norm > 0 else 1.0
            for p, x in zip(group, b, strict=True):
                p.add_(factor * x - p, alpha=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = [DARTS(channels=16, cells=8, scalars=True).to(args.device) for _ in range(5)]
    for model in models:
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
    steps = {
        "SGD(foreach=True, momentum=0.9)": torch.optim.SGD(models[0].parameters(), lr=1e-3, momentum=0.9, foreach=True),
        "ProxSGD": ProxSGD(operations(models[1]), mu=1e-3, lr=1e-3, rho=0.8),
        "RMDA": RMDA(operations(models[3]), mu=1e-3, lr=1e-1),
        "RAMDA": RAMDA(operations(models[4]), mu=1e-3, lr=1e-2),
        "loop over groups": Loop(operations(models[2]), mu=1e-3, lr=1e-3, rho=0.8),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.rounds + 3):
        for name, optimizer in steps.items():
            start = time.process_time() if args.device == "cpu" else time.perf_counter()
            optimizer.step()
            if args.device != "cpu":
                torch.cuda.synchronize()
            end = time.process_time() if args.device == "cpu" else time.perf_counter()
            if i >= 3:
                times[name].append(1e3 * (end - start))
    tensors = len(list(models[0].parameters()))
    numel = sum(p.numel() for p in models[0].parameters())
    groups = len(operations(models[1]))
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads")
    print(f"{tensors} tensors, {numel:,} parameters, {groups} groups")
    base = statistics.median(times["SGD(foreach=True, momentum=0.9)"])
    for name, measured in times.items():
        middle = statistics.median(measured)
        detail = f"median of {len(measured)}, least {min(measured):.2f}"
        print(f"{name:34} {middle:8.2f} ms ({detail})  {middle / base:5.2f} x SGD")


if __name__ == "__main__":
    main()
