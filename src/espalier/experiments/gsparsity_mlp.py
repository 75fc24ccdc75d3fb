"""Neuron pruning of the MNIST perceptron by ProxSGD, RMDA and RAMDA, on one recipe.

    ESPALIER_DATA=... python -m espalier.experiments.gsparsity_mlp --method proxsgd rmda ramda --mu 0.01 0.02
    ESPALIER_DATA=... python -m espalier.experiments.gsparsity_mlp --target 0.2 --epochs 2

Groups are the hidden neurons with their biases. With ``--target``, μ is found so that at most this share of the MACs
stays. One JSON line per run.
"""

import argparse
import json
import warnings
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from espalier.construct import construct
from espalier.data import load
from espalier.experiments.l0 import accuracy
from espalier.models.mlp_l0 import MLP
from espalier.space.search_space import search_space
from espalier.sparsify.bisect import fit_to_target
from espalier.sparsify.flat import FlatProximal
from espalier.sparsify.grouping import Grouping, layer_groups, space_groups
from espalier.sparsify.proxsgd import ProxSGD
from espalier.sparsify.rmda import RAMDA, RMDA

METHODS = ("proxsgd", "rmda", "ramda")
Images: TypeAlias = tuple[Tensor, Tensor]
HIDDEN = ["layers.0", "layers.1"]


def run(method: str, mu: float, epochs: int, lr: float, seed: int, train: Images, test: Images) -> dict[str, Any]:
    """Train, snap, compare the accuracies; ``flips`` counts groups that changed sides in the last epoch."""
    torch.manual_seed(seed)
    model = MLP()
    groups = layer_groups(model, HIDDEN, "filter")
    opt = optimizer(method, groups, mu, lr)
    flips = trained(model, opt, epochs, seed, train)
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


def optimizer(method: str, groups: Grouping, mu: float, lr: float) -> FlatProximal:
    """The optimizer of a recipe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "proxsgd":
            return ProxSGD(groups, mu=mu, lr=lr, rho=0.9)
        if method == "rmda":
            return RMDA(groups, mu=mu, lr=lr)
        return RAMDA(groups, mu=mu, lr=0.1 * lr)  # adaptive: the authors, too, take a tenth


def trained(model: MLP, opt: FlatProximal, epochs: int, seed: int, data: Images) -> Tensor:
    """Train; the groups that changed sides in the last epoch, bool [groups]."""
    x, y = data
    flips = torch.zeros_like(opt.dormant, dtype=torch.bool)
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
    return flips


def to_target(
    method: str, target: float, epochs: int, lr: float, seed: int, train: Images, test: Images
) -> dict[str, Any]:
    """Find μ for a share of the MACs; accuracies of the best trial's network, before and after it is constructed."""
    torch.manual_seed(seed)
    model = MLP()
    space = search_space(model, (train[0][:2],), levels=("channel",))

    def fit(mu: float) -> FlatProximal:
        opt = optimizer(method, space_groups(space), mu, lr)
        trained(model, opt, epochs, seed, train)
        return opt

    found = fit_to_target(space, fit, target, of="macs")
    small = construct(space, found.best.state.solution)
    trials = [[float(f"{trial.mu:.4g}"), round(trial.share, 4)] for trial in found.trials]
    line: dict[str, Any] = {"method": method, "target": target, "epochs": epochs, "lr": lr, "seed": seed}
    line |= {"met": found.met, "mu": float(f"{found.best.mu:.4g}"), "macs": round(found.best.share, 4)}
    return line | {"before": accuracy(model, *test), "after": accuracy(small, *test), "trials": trials}


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--mu", type=float, nargs="+", default=[0.01, 0.02])
    parser.add_argument("--target", type=float, help="share of the MACs to find mu for, instead of --mu")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = [load("mnist", split, validation=0).tensors() for split in ("train", "test")]
    train, test = ((x.flatten(1), y) for x, y in data)
    for method in args.method:
        if args.target is not None:
            line = to_target(method, args.target, args.epochs, args.lr, args.seed, train, test)
            print(json.dumps(line), flush=True)
            continue
        for mu in args.mu:
            line = run(method, mu, args.epochs, args.lr, args.seed, train, test)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
