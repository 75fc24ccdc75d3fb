"""CPU seconds of an epoch (600 steps of 100 images) with gates, beside the L0-ARM authors' code, by turns.

    python benchmarks/l0_epoch.py [--reference CHECKOUT] [--steps 60] [--network mlp lenet5]

CHECKOUT is a clone of https://github.com/leo-yangli/l0-arm (read, not changed). Both start from the same gate
probabilities, on random images of MNIST's shape, and take turns of 20 steps; printed is 600 times a step of the
median turn. Theirs is timed without its meters and plots.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from espalier.experiments.l0 import Recipe, gated, train_epoch

warnings.simplefilter("ignore")
BLOCK = 20
Step = Callable[[torch.Tensor, torch.Tensor], None]


def ours(network: str, method: str) -> Step:
    """One step of the recipe in espalier.experiments.l0."""
    gates = gated(Recipe(network, method), 60_000)
    opt = torch.optim.Adam([*gates.model.parameters(), *gates.parameters()], lr=1e-3, fused=True)
    order = torch.arange(100)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        x = x.flatten(1) if network == "mlp" else x
        train_epoch(gates, opt, x, y, order, 100)

    return step


def theirs(network: str, method: str, checkout: Path) -> Step:
    """One step of their main.train."""
    sys.path.insert(0, str(checkout))
    from config import opt as options  # pyright: ignore[reportMissingImports]

    options.use_gpu, options.ar = False, method == "ar"
    import models  # pyright: ignore[reportMissingImports]

    kind, lam = (models.ARMMLP, (0.1,) * 3) if network == "mlp" else (models.ARMLeNet5, (0.1,) * 4)
    model = kind(lambas=lam)
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        model.train()
        opt.zero_grad()
        (cross_entropy(model(x, y), y) + model.regularization()).backward()
        opt.step()
        model.update_ema()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--network", nargs="+", choices=("mlp", "lenet5"), default=["mlp", "lenet5"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y = torch.randn(100, 1, 28, 28), torch.randint(10, (100,))
    rows = []
    for network in args.network:
        for method in ("arm", "ar"):
            makers = {"ours": ours(network, method)}
            if args.reference:
                makers["theirs"] = theirs(network, method, args.reference)
            spent: dict[str, list[float]] = {name: [] for name in makers}
            for block in range(1 + args.steps // BLOCK):
                for name, step in makers.items():
                    start = time.process_time()
                    for _ in range(BLOCK):
                        step(x, y)
                    if block:
                        spent[name].append((time.process_time() - start) / BLOCK)
            rows.append((network, method, {name: 600 * statistics.median(s) for name, s in spent.items()}))
    print(f"torch {torch.__version__}, CPU, 1 thread, {args.steps} steps each, in turns of {BLOCK}")
    for network, method, epochs in rows:
        line = "  ".join(f"{name} {seconds:6.2f} s" for name, seconds in epochs.items())
        share = f"  {epochs['ours'] / epochs['theirs']:.2f}" if "theirs" in epochs else ""
        print(f"{network:7} {method:4} {line}{share}")


if __name__ == "__main__":
    main()
