"""The i-SpaSP papers' experiments: synthetic residuals (Figure 3) and the two-layer network (Figures 1 and
2).

``python -m espalier.experiments.ispasp figure3 --out results.jsonl`` and ``python -m
espalier.experiments.ispasp mnist --hidden 1000 --out results.jsonl --cache dir``; the environment variable
ESPALIER_DATA names the folder that holds ``mnist/train-images.npy`` and so on. Results are JSON lines;
cells that are already in the file are skipped, so that a stopped run continues.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.curvature.moments import Moments, collect
from espalier.models.two_layer import TwoLayer
from espalier.select.auxiliary import PAPER, AuxiliaryOptions, auxiliary
from espalier.select.backward import backward_path
from espalier.select.gfs import gfs
from espalier.select.ispasp import ispasp
from espalier.select.omp import omp_path
from espalier.select.refit import (
    Path,
    Reconstruction,
    Selection,
    from_moments,
    keep_dense,
    reconstruction,
    refit,
)

POWERS = (0.3, 0.5, 0.7, 0.9)
SIZES = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


# ---------------------------------------------------------------- results that survive a stop


class Results:
    """JSON lines with skipping: `done(**key)` says whether a line with these values exists; each is also shown."""

    def __init__(self, path: FilePath) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def done(self, **key: Any) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*(f"{k}={v}" for k, v in row.items() if isinstance(v, int | float | str)), file=sys.stderr, flush=True)


# ---------------------------------------------------------------- Figure 3


def compressible(d: int, samples: int, p: float, generator: torch.Generator) -> Tensor:
    """A nonnegative H [d, samples] whose sorted row sums are exactly i^(−1/p), in random row order."""
    rows = -torch.rand(d, samples, generator=generator, dtype=torch.float64).clamp_min(1e-300).log()
    rows *= (torch.arange(1, d + 1, dtype=torch.float64) ** (-1 / p) / rows.sum(1))[:, None]
    return rows[torch.randperm(d, generator=generator)]


def synthetic_problem(d: int, p: float, seed: int, outputs: int = 100, samples: int = 100) -> Reconstruction:
    """One of Figure 3's problems; W1 depends on d alone."""
    hidden = compressible(d, samples, p, torch.Generator().manual_seed(seed))
    weight = torch.randn(outputs, d, generator=torch.Generator().manual_seed(1000), dtype=torch.float64)
    return reconstruction(weight / outputs**0.5, hidden @ hidden.T, mean=hidden.mean(1), ridge=1e-15)


def figure3(out: FilePath, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Squared residual of every size, power and hidden width, for each selector."""
    results = Results(out)
    methods: dict[str, Callable[[Reconstruction, int], Selection]] = {
        "ispasp": ispasp,
        "ispasp+refit": lambda problem, size: ispasp(problem, size, refitted=True),
        "auxiliary (norms, from zero)": lambda problem, size: auxiliary(problem, size, PAPER),
        "auxiliary (scaled)": auxiliary,
        "auxiliary (pcg)": lambda problem, size: auxiliary(problem, size, AuxiliaryOptions(solver="pcg")),
        "auxiliary (exact)": lambda problem, size: auxiliary(problem, size, AuxiliaryOptions(solver="exact")),
    }
    for d in (100, 200):
        for p in POWERS:
            for seed in seeds:
                if results.done(d=d, p=p, seed=seed):
                    continue
                problem = synthetic_problem(d, p, seed)
                sizes = list(range(1, d))
                errors = {name: [method(problem, size).error for size in sizes] for name, method in methods.items()}
                path = omp_path(problem)
                errors["omp"] = [refit(problem, path.support(size)).error for size in sizes]
                rounded = {name: [float(f"{e:.6g}") for e in values] for name, values in errors.items()}
                results.add(d=d, p=p, seed=seed, sizes=sizes, errors=rounded)


def slope(sizes: Sequence[int], values: Sequence[float], low: int, high: int) -> float:
    """Least-squares slope of log(values) against log(sizes) for sizes from `low` to `high`."""
    pairs = [(np.log(s), np.log(v)) for s, v in zip(sizes, values, strict=True) if low <= s <= high and v > 0]
    x, y = np.array(pairs).T
    return float(np.polyfit(x, y, 1)[0])


def finite_tail(d: int, p: float) -> list[float]:
    """Σ_{i=s+1}^{d} i^(−2/p) for s = 1 … d − 1: the residual's decay where only d rows exist."""
    squares = np.arange(1, d + 1, dtype=float) ** (-2 / p)
    return [float(squares[s:].sum()) for s in range(1, d)]


# ---------------------------------------------------------------- Figures 1 and 2


def load_images(name: str, split: str, first: int | None = None) -> tuple[Tensor, Tensor]:
    """Images [n, ...] in [0, 1] and labels [n] of a dataset under ESPALIER_DATA; only the `first` few if
    given."""
    root = os.environ.get("ESPALIER_DATA")
    if not root:
        raise FileNotFoundError("set ESPALIER_DATA to the folder that holds the unpacked datasets")
    folder = FilePath(root) / name
    images = torch.from_numpy(np.load(folder / f"{split}-images.npy", mmap_mode="r")[:first].astype(np.float32) / 255)
    return images, torch.from_numpy(np.load(folder / f"{split}-labels.npy")[:first].astype(np.int64))


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    lr: float,
    batch: int = 256,
    seed: int = 0,
    checkpoint: FilePath | None = None,
) -> None:
    """Adam and cross-entropy with a cosine decay to zero; float32. Stopped, it goes on after the last epoch in
    `checkpoint`."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * ((len(x) + batch - 1) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    done = 0
    if checkpoint is not None and checkpoint.exists():
        done, *states, drawn = torch.load(checkpoint)
        for part, state in zip((model, optimiser, schedule), states, strict=True):
            part.load_state_dict(state)
        generator.set_state(drawn)
    model.train()
    for epoch in range(done, epochs):
        for index in torch.randperm(len(x), generator=generator).split(batch):
            optimiser.zero_grad()
            functional.cross_entropy(model(x[index]), y[index]).backward()
            optimiser.step()
            schedule.step()
        if checkpoint is not None:
            states = [part.state_dict() for part in (model, optimiser, schedule)]
            torch.save((epoch + 1, *states, generator.get_state()), checkpoint)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percentage of right answers, in eval mode."""
    model.eval()
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    return 100 * right / len(x)


def finetuned(model: nn.Module, x: Tensor, y: Tensor, *, images: int, seed: int) -> nn.Module:
    """A copy after one epoch of Adam (5e-4, cosine, batches of 64) on `images` random ones: the same for every
    method."""
    model = copy.deepcopy(model)
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + 1))[:images]
    train(model, x[pick], y[pick], epochs=1, lr=5e-4, batch=64, seed=seed)
    return model


@torch.no_grad()
def narrowed(dense: TwoLayer, selection: Selection, use_bias: bool) -> TwoLayer:
    """The pruned two-layer network of a selection."""
    small = TwoLayer(dense.hidden.in_features, len(selection.support), dense.output.out_features)
    small.hidden.weight.copy_(dense.hidden.weight[selection.support])
    small.hidden.bias.copy_(dense.hidden.bias[selection.support])
    small.output.weight.copy_(selection.weights)
    small.output.bias.copy_(dense.output.bias)
    if use_bias and selection.bias is not None:
        small.output.bias.add_(selection.bias)
    return small.eval()


def mnist_selections(
    dense: TwoLayer,
    raw: Reconstruction,
    centred: Reconstruction,
    sizes: Sequence[int],
    seed: int,
    skip: set[str],
) -> Iterator[tuple[str, int, Callable[[], Selection], bool]]:
    """(method, size, how to select, whether the bias is refitted) for every cell not in `skip`."""
    units = raw.units
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(units, generator=generator)
    norms = (dense.output.weight.norm(dim=0) * dense.hidden.weight.norm(dim=1)).double()
    largest = norms.argsort(descending=True)
    paths: dict[str, Path] = {}

    def along(name: str, size: int) -> Selection:
        if name not in paths:
            paths[name] = omp_path(centred, max(sizes)) if name == "omp" else backward_path(centred, min(sizes))
        return refit(centred, paths[name].support(size))

    methods: dict[str, tuple[Callable[[int], Selection], bool]] = {
        "random": (lambda s: keep_dense(raw, shuffled[:s]), False),
        "magnitude": (lambda s: keep_dense(raw, largest[:s]), False),
        "ispasp": (lambda s: ispasp(raw, s), False),
        "gfs": (lambda s: gfs(raw, s, seed=seed), False),
        "random+refit": (lambda s: refit(centred, shuffled[:s]), True),
        "magnitude+refit": (lambda s: refit(centred, largest[:s]), True),
        "ispasp+refit": (lambda s: refit(centred, ispasp(raw, s).support), True),
        "gfs+refit": (lambda s: refit(centred, gfs(raw, s, seed=seed).support), True),
        "auxiliary (norms, from zero)": (lambda s: auxiliary(raw, s, PAPER), False),
        "auxiliary (scaled)": (lambda s: auxiliary(raw, s), False),
        "auxiliary (pcg)": (lambda s: auxiliary(centred, s, AuxiliaryOptions(solver="pcg")), True),
        "auxiliary (exact)": (lambda s: auxiliary(centred, s, AuxiliaryOptions(solver="exact")), True),
        "omp": (lambda s: along("omp", s), True),
        "backward": (lambda s: along("backward", s), True),
    }
    for name, (method, bias) in methods.items():
        for size in sizes:
            if name == "auxiliary (exact)" and size > 1000:
                continue  # T factorisations of 2s columns each: too slow, and nothing is left to gain
            if f"{name}/{size}" not in skip:
                yield name, size, lambda method=method, size=size: method(size), bias


def mnist(
    out: FilePath,
    cache: FilePath,
    *,
    hidden: int = 1000,
    seeds: Sequence[int] = (0, 1, 2),
    sizes: Sequence[int] = SIZES,
    epochs: int = 10,
    calibration: int = 10_000,
    finetune: int = 1,
    methods: Sequence[str] | None = None,
) -> None:
    """Test accuracy of the pruned two-layer network before and after fine-tuning, for all selectors or `methods`."""
    results = Results(out)
    sizes = [size for size in sizes if size < hidden]
    x, y = load_images("mnist", "train")
    test_x, test_y = load_images("mnist", "test")
    x, test_x = x.flatten(1), test_x.flatten(1)
    for seed in seeds:
        torch.manual_seed(seed)
        dense = TwoLayer(784, hidden, 10)
        file = cache / f"two-layer-{hidden}-seed{seed}-epochs{epochs}.pt"
        if file.exists():
            dense.load_state_dict(torch.load(file))
        else:
            cache.mkdir(parents=True, exist_ok=True)
            train(dense, x, y, epochs=epochs, lr=1e-3, seed=seed, checkpoint=file.with_suffix(".part"))
            torch.save(dense.state_dict(), file)
        key = {"hidden": hidden, "seed": seed}
        if not results.done(**key, method="dense"):
            results.add(**key, method="dense", size=hidden, before=accuracy(dense, test_x, test_y))
        done = {f"{r['method']}/{r['size']}" for r in results.rows if r["hidden"] == hidden and r["seed"] == seed}
        if all(f"{name}/{size}" in done for name in methods or () for size in sizes) and methods:
            continue
        pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:calibration]
        started = time.perf_counter()
        kept = cache / f"moments-{hidden}-seed{seed}-epochs{epochs}-{calibration}.pt"
        if kept.exists():
            moments = Moments(*torch.load(kept), name="output")
        else:
            moments = collect(dense, ["output"], x[pick].split(1000))["output"]
            torch.save((moments.gram, moments.sums, moments.count), kept)
        spent = time.perf_counter() - started
        if not results.done(**key, method="moments"):
            results.add(**key, method="moments", size=hidden, seconds=round(spent, 3))
        raw = from_moments(moments, dense.output.weight, centred=False)
        centred = from_moments(moments, dense.output.weight, centred=True)
        del moments
        for name, size, select, bias in mnist_selections(dense, raw, centred, sizes, seed, done):
            if methods is not None and name not in methods:
                continue
            started = time.perf_counter()
            selection = select()
            spent = time.perf_counter() - started
            small = narrowed(dense, selection, bias)
            before = accuracy(small, test_x, test_y)
            train(small, x, y, epochs=finetune, lr=1e-3, seed=seed)
            results.add(
                **key,
                method=name,
                size=size,
                before=before,
                after=accuracy(small, test_x, test_y),
                relative_error=selection.relative,
                seconds=round(spent, 3),
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("figure3", help="synthetic residuals")
    second = commands.add_parser("mnist", help="two-layer network, before and after fine-tuning")
    for command in (first, second):
        command.add_argument("--out", type=FilePath, required=True, help="JSON lines; finished cells are skipped")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    second.add_argument("--cache", type=FilePath, required=True, help="where trained dense networks are kept")
    second.add_argument("--hidden", type=int, default=1000)
    second.add_argument("--epochs", type=int, default=10)
    second.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    second.add_argument("--methods", nargs="+", help="only these; the paper's selectors and ours by default")
    options = vars(parser.parse_args(arguments))
    {"figure3": figure3, "mnist": mnist}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
