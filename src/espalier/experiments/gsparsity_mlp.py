"""Neuron pruning of the MNIST perceptron by ProxSGD, RMDA and RAMDA, on one recipe.

    ESPALIER_DATA=... python -m espalier.experiments.gsparsity_mlp --method proxsgd rmda ramda --mu 0.01 0.02

Groups are the hidden neurons with their biases. One JSON line per run.
"""

import argparse
import json
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from espalier.data import load
from espalier.experiments.l0 import accuracy
from espalier.models.mlp_l0 import MLP
from espalier.sparsify.flat import FlatProximal
from espalier.sparsify.grouping import layer_groups
from espalier.sparsify.proxsgd import ProxSGD
from espalier.sparsify.rmda import RAMDA, RMDA

METHODS = ("proxsgd", "rmda", "ramda")
HIDDEN = ["layers.0", "layers.1"]


def run(method: str, mu: float, epochs: int, lr: float, seed: int, train: Any, test: Any) -> dict[str, Any]:
    """Train, snap, compare the accuracies; ``flips`` counts groups that changed sides in the last epoch."""
    torch.manual_seed(seed)
    model, (x, y) = MLP(), train
    groups = layer_groups(model, HIDDEN, "filter")
    opt: FlatProximal
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "proxsgd":
            opt = ProxSGD(groups, mu=mu, lr=lr, rho=0.9)
        elif method == "rmda":
            opt = RMDA(groups, mu=mu, lr=lr)
        else:
            opt = RAMDA(groups, mu=mu, lr=0.1 * lr)  # adaptive: the authors, too, take a tenth
    flips = torch.zeros(len(groups), dtype=torch.bool)
    for epoch in range(epochs):
        model.train()
        flips.zero_()
        before: Tensor = opt.dormant > 0
        for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed * 1009 + epoch)).split(100):
            opt.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
            now = opt.dormant > 0
            flips |= now != before
            before = now
    line: dict[str, Any] = {"method": method, "mu": mu, "epochs": epochs, "lr": lr, "seed": seed}
    line |= {"groups": len(groups), "flips": int(flips.sum()), "before": accuracy(model, *test)}
    for threshold in (None, 1e-6, 1e-3):
        zero = set(opt.zero_groups(threshold))
        line[f"zero at {threshold or 'support'}"] = len(zero)
    opt.snap()
    line["after"] = accuracy(model, *test)
    first, second = (int((model.get_parameter(f"{n}.weight").norm(dim=1) > 0).sum()) for n in HIDDEN)
    left = 784 * first + first * second + 10 * second
    return {**line, "retained": f"{first}-{second}", "pruned": round(100 * (1 - left / 266_200), 2)}


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--mu", type=float, nargs="+", default=[0.01, 0.02])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = [load("mnist", split, validation=0).tensors() for split in ("train", "test")]
    train, test = ((x.flatten(1), y) for x, y in data)
    for method in args.method:
        for mu in args.mu:
            line = run(method, mu, args.epochs, args.lr, args.seed, train, test)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
