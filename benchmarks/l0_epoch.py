"""CPU seconds of an epoch (600 steps of 100 images) with gates, beside the L0-ARM authors' code, by turns.

    python benchmarks/l0_epoch.py [--reference CHECKOUT] [--steps 60] [--network mlp lenet5] [--method arm ar]
        [--trained runs/l0 [--lam separate]]

CHECKOUT is a clone of https://github.com/leo-yangli/l0-arm (read, not changed). Both start from the same gate
probabilities, on random images of MNIST's shape, and take turns of 20 steps. With --trained, ours starts from the
weights and gates that the runs of espalier.experiments.l0 in that folder have reached (theirs costs the same
throughout). Printed is 600 times a step of the median turn and of the fastest one, which other work on the machine
disturbs least. Theirs is timed without its meters, plots and data loader: both take their batches out of one
tensor, and both flush denormal numbers.
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

from espalier.experiments.l0 import Recipe, gated, laid_out, train_epoch

warnings.simplefilter("ignore")
BLOCK = 20
Steps = Callable[[torch.Tensor, torch.Tensor], None]


def ours(network: str, method: str, trained: Path | None = None, lam: str = "one") -> Steps:
    """Steps of the recipe in espalier.experiments.l0."""
    recipe = Recipe(network, method, lam)
    gates = gated(recipe, 60_000)
    if trained:
        state = torch.load(sorted(trained.glob(f"{network}-{method}-{lam}-*.pt"))[0], weights_only=True)
        gates.model.load_state_dict(state["model"])
        gates.load_state_dict(state["gates"])
    opt = torch.optim.Adam([*gates.model.parameters(), *gates.parameters()], lr=1e-3, fused=True)
    order = torch.arange(100 * BLOCK)

    def steps(x: torch.Tensor, y: torch.Tensor) -> None:
        train_epoch(gates, opt, laid_out(recipe, x), y, order, 100)

    return steps


def theirs(network: str, method: str, checkout: Path) -> Steps:
    """Steps of their main.train."""
    sys.path.insert(0, str(checkout))
    from config import opt as options  # pyright: ignore[reportMissingImports]

    options.use_gpu, options.ar = False, method == "ar"
    import models  # pyright: ignore[reportMissingImports]

    kind, lam = (models.ARMMLP, (0.1,) * 3) if network == "mlp" else (models.ARMLeNet5, (0.1,) * 4)
    model = kind(lambas=lam)
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.arange(100 * BLOCK)

    def steps(images: torch.Tensor, labels: torch.Tensor) -> None:
        model.train()
        for rows in order.split(100):
            x, y = images[rows], labels[rows]
            opt.zero_grad()
            (cross_entropy(model(x, y), y) + model.regularization()).backward()
            opt.step()
            model.update_ema()

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--lam", choices=("one", "separate"), default="one", help="of the runs in --trained")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--network", nargs="+", choices=("mlp", "lenet5"), default=["mlp", "lenet5"])
    parser.add_argument("--method", nargs="+", choices=("arm", "ar"), default=["arm", "ar"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as the recipe's command line does: weights of closed units decay to them
    x, y = torch.randn(100 * BLOCK, 1, 28, 28), torch.randint(10, (100 * BLOCK,))
    rows = []
    for network in args.network:
        for method in args.method:
            makers = {"ours": ours(network, method, args.trained, args.lam)}
            if args.reference:
                makers["theirs"] = theirs(network, method, args.reference)
            spent: dict[str, list[float]] = {name: [] for name in makers}
            for block in range(1 + args.steps // BLOCK):
                for name, steps in makers.items():
                    start = time.process_time()
                    steps(x, y)
                    if block:
                        spent[name].append((time.process_time() - start) / BLOCK)
            rows.append(
                (network, method, {name: (600 * statistics.median(s), 600 * min(s)) for name, s in spent.items()})
            )
    print(f"torch {torch.__version__}, CPU, 1 thread, {args.steps} steps each, in turns of {BLOCK}")
    for network, method, epochs in rows:
        line = "  ".join(f"{name} {middle:6.2f} s (least {least:.2f})" for name, (middle, least) in epochs.items())
        if "theirs" in epochs:
            line += "  " + " ".join(f"{a / b:.2f}" for a, b in zip(epochs["ours"], epochs["theirs"], strict=True))
        print(f"{network:7} {method:4} {line}")


if __name__ == "__main__":
    main()
