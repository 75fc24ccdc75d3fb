"""A step of H2SPG in each phase against a step of the bare base optimizer, in turn.

    python benchmarks/h2spg_step.py

On ResNet-50 (161 tensors, 25.6 M parameters; its segments, and its channels) and on a DARTS supernet of 9 cells
(over 1,500 tensors). SGD with momentum 0.9; half of the structures are redundant. Medians of ratios.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

import espalier
from espalier.data import import_torchvision
from espalier.models import DARTS


def measure(name: str, model: nn.Module, x: torch.Tensor, levels: Sequence[str] = ("segment",), runs: int = 41) -> None:
    space = espalier.search_space(model, (x,), levels=levels)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    base = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, foreach=True)
    tensors = sum(1 for _ in model.parameters())
    print(f"{name}: {tensors} tensors, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    for phase, warmup, projection, skip in (
        ("warm-up", 10**6, 1, 3),
        ("hybrid", 1, 10**6, 3),
        ("done", 1, 1, 3),
    ):
        opt = espalier.H2SPG(
            space, budget=espalier.Budget(structures=0.5), lr=1e-6, momentum=0.9, foreach=True,
            warmup_steps=warmup, projection_steps=projection,
        )  # fmt: skip
        for _ in range(skip):
            base.step()
            opt.step()
        ratios, bare, ours = [], [], []
        for _ in range(runs):
            times = []
            for step in (base.step, opt.step):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            bare.append(times[0])
            ours.append(times[1])
            ratios.append(times[1] / times[0])
        print(
            f"  {phase:8} bare {statistics.median(bare) * 1e3:6.2f} ms, H2SPG {statistics.median(ours) * 1e3:6.2f} ms, "
            f"ratio {statistics.median(ratios):.2f}"
        )


def main() -> None:
    torch.set_num_threads(1)
    import_torchvision()
    import torchvision

    measure("ResNet-50", torchvision.models.resnet50(), torch.randn(2, 3, 64, 64))
    measure("ResNet-50, channels", torchvision.models.resnet50(), torch.randn(2, 3, 64, 64), ("channel",))
    measure("DARTS, 9 cells", DARTS(channels=16, cells=9), torch.randn(2, 3, 32, 32))


if __name__ == "__main__":
    main()
