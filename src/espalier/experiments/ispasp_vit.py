"""One-shot pruning of a small vision transformer on Fashion-MNIST: attention heads and MLP neurons.

``python -m espalier.experiments.ispasp_vit --out results.jsonl --cache dir``; ESPALIER_DATA names the
folder that holds ``fashion-mnist/*.npy``. There is no checkpoint, so the transformer is trained first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.experiments.ispasp import Results, accuracy, finetuned, load_images, train
from espalier.experiments.ispasp_resnet import FRACTIONS, ranked, uniform_sizes
from espalier.select.allocate import mac_cost
from espalier.select.layerwise import LayerResult, Pair, narrow, prune_layers


class Layer(nn.Module):
    """Pre-norm attention and GELU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class SmallViT(nn.Module):
    """28x28 images in 7x7 patches; width 64, 4 layers, 8 heads."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


def vit_pairs(depth: int = 4, heads: int = 8) -> list[Pair]:
    """Heads and MLP neurons of every layer, in the order of the forward pass."""
    pairs = []
    for n in range(depth):
        attributes = (f"layers.{n}.heads",)
        qkv, proj = (f"layers.{n}.qkv",), (f"layers.{n}.proj",)
        pairs.append(Pair(qkv, proj, units=heads, fused=3, attributes=attributes))
        pairs.append(Pair((f"layers.{n}.fc1",), (f"layers.{n}.fc2",)))
    return pairs


def scores(name: str, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> list[Tensor]:
    """ "random", "magnitude" (producer rows) or "taylor" (first-order effect of the consumer's columns)."""
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    if name == "taylor":
        functional.cross_entropy(model(x), y, reduction="sum").backward()
    found = []
    for pair in vit_pairs():
        units = pair.count(model)
        written: Tensor = model.get_submodule(pair.producers[0]).weight  # type: ignore[assignment]
        read: Tensor = model.get_submodule(pair.consumers[0]).weight  # type: ignore[assignment]
        if name == "random":
            found.append(torch.rand(units, generator=generator))
        elif name == "magnitude":
            found.append(written.detach().view(pair.fused, units, -1).square().sum((0, 2)))
        else:
            assert read.grad is not None
            found.append((read * read.grad).detach().view(len(read), units, -1).sum((0, 2)).abs())
    model.zero_grad()
    return found


def vit(
    out: Path,
    cache: Path,
    *,
    epochs: int = 6,
    images: int = 1000,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    finetune: int = 0,
) -> None:
    """Test accuracy of every method and budget, as pruned and, with `finetune` labelled images, after one epoch."""
    results = Results(out)
    x, y = load_images("fashion-mnist", "train")
    test_x, test_y = load_images("fashion-mnist", "test")
    x, test_x = (x.view(-1, 1, 28, 28) - 0.3) / 0.35, (test_x.view(-1, 1, 28, 28) - 0.3) / 0.35
    torch.manual_seed(seed)
    model, pairs = SmallViT(), vit_pairs()
    file = cache / f"small-vit-seed{seed}-epochs{epochs}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file))
    else:
        train(model, x, y, epochs=epochs, lr=1e-3, seed=seed)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.eval()
    units = [pair.count(model) for pair in pairs]
    groups = [(n, (*p.producers, *p.consumers)) for n, p in zip(units, pairs, strict=True)]
    cost = mac_cost(model, groups, x[:1])
    full = cost(units)
    if not results.done(method="dense", seed=seed):
        results.add(method="dense", macs=1.0, seed=seed, accuracy=accuracy(model, test_x, test_y), multiply_adds=full)
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:images]
    batches = list(x[pick].split(250))
    for fraction in FRACTIONS:
        uniform = uniform_sizes(units, cost, fraction * full)
        found_by = selections(model, batches, (x[pick], y[pick]), fraction, uniform, seed)
        for name, method in found_by.items():
            if results.done(method=name, macs=fraction, seed=seed) or name not in (methods or found_by):
                continue
            started = time.perf_counter()
            found = method()
            spent = time.perf_counter() - started
            sizes = [len(r.selection.support) for r in found]
            small = narrow(model, found)
            after = accuracy(finetuned(small, x, y, images=finetune, seed=seed), test_x, test_y) if finetune else None
            results.add(
                method=name,
                macs=fraction,
                seed=seed,
                reached=cost(sizes) / full,
                sizes=sizes,
                pruned=accuracy(small, test_x, test_y),
                finetuned=after,
                seconds=round(spent, 1),
            )


def selections(
    model: nn.Module,
    batches: Sequence[Tensor],
    labelled: tuple[Tensor, Tensor],
    fraction: float,
    uniform: Sequence[int],
    seed: int,
) -> dict[str, Callable[[], list[LayerResult]]]:
    """Every method of the table at one budget; only "taylor" looks at labels."""
    pairs = vit_pairs()

    def baseline(name: str) -> Callable[[], list[LayerResult]]:
        return lambda: ranked(model, pairs, scores(name, model, *labelled, seed), uniform)

    return {
        **{name: baseline(name) for name in ("random", "magnitude", "taylor")},
        "omp (uniform)": lambda: prune_layers(model, pairs, batches, sizes=uniform),
        "omp (dense inputs)": lambda: prune_layers(model, pairs, batches, macs=fraction, sequential=False),
        "omp": lambda: prune_layers(model, pairs, batches, macs=fraction),
        "backward": lambda: prune_layers(model, pairs, batches, macs=fraction, method="backward"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="where the trained transformer is kept")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the dense training and the calibration sample")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--finetune", type=int, default=0, help="labelled images for one epoch after pruning")
    vit(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
