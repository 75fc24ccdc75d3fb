"""CPU milliseconds of a training step with gates: closed units left out, against closed units multiplied by 0.

    python benchmarks/conditional.py [--rounds 12]

Gates on layers (MLP and LeNet-5 of Table 2, L0-ARM, 100 images) and on the operations of DARTS cells (search space of
segments, 16 images of 32×32), at several shares of open gates. Both ways take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from espalier import search_space
from espalier.experiments.l0 import Recipe, gated
from espalier.models import DARTS
from espalier.sparsify import SpaceGates
from espalier.sparsify.gating import Gating


def layers(network: str, conditional: bool) -> tuple[Gating, torch.Tensor]:
    gates = gated(Recipe(network, "arm"), 60_000)
    gates.conditional = conditional
    return gates, torch.randn(100, 784) if network == "mlp" else torch.randn(100, 1, 28, 28)


def cells(conditional: bool) -> tuple[Gating, torch.Tensor]:
    torch.manual_seed(0)
    model = DARTS(8, 3, 2, ("skip", "sep_conv_3x3", "dil_conv_3x3"), affine=True)
    space = search_space(model, (torch.randn(2, 3, 32, 32),), keep=["stem"])
    return SpaceGates(space, estimator="arm", lam=0.1, conditional=conditional), torch.randn(16, 3, 32, 32)


NETWORKS: dict[str, Callable[[bool], tuple[Gating, torch.Tensor]]] = {
    "mlp": lambda c: layers("mlp", c),
    "lenet5": lambda c: layers("lenet5", c),
    "darts cells": cells,
}


def step(gates: Gating, x: torch.Tensor) -> None:
    gates.zero_grad(set_to_none=True)
    gates.model.zero_grad(set_to_none=True)
    gates.backward(lambda: cross_entropy(gates(x), torch.zeros(len(x), dtype=torch.long)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU, 1 thread, median of {args.rounds}")
    for name, make in NETWORKS.items():
        pairs = {"left out": make(True), "multiplied": make(False)}
        for share in (0.9, 0.5, 0.1):
            spent: dict[str, list[float]] = {way: [] for way in pairs}
            for i in range(args.rounds + 2):
                for way, (gates, x) in pairs.items():
                    with torch.no_grad():
                        gates.phi.fill_(float(gates.g.inverse(torch.tensor(share))))
                    gates.train()
                    gates.model.train()
                    start = time.process_time()
                    step(gates, x)
                    if i >= 2:
                        spent[way].append(1e3 * (time.process_time() - start))
            left, full = (statistics.median(s) for s in spent.values())
            print(f"{name:12} open {share:.0%}  left out {left:8.2f} ms  multiplied {full:8.2f} ms  {left / full:.2f}")


if __name__ == "__main__":
    main()
