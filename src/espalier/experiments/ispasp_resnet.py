"""One-shot pruning of ResNet-20 on CIFAR-10 without labels, then with equal fine-tuning.

``python -m espalier.experiments.ispasp_resnet --out results.jsonl``; ESPALIER_DATA names the folder that
holds ``cifar10/*.npy`` and ``checkpoints/resnet20-cifar10.safetensors``. The inner channels of every block
are removed to 10 to 60 % fewer multiply-adds. Finished cells are skipped.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from espalier.batchnorm import recalibrate
from espalier.curvature.moments import Moments, collect
from espalier.experiments.ispasp import Results, accuracy, finetuned, load_images
from espalier.models.resnet_cifar import BasicBlock, CifarResNet, resnet20
from espalier.select.allocate import mac_cost
from espalier.select.layerwise import LayerResult, Pair, narrow, prune_layers
from espalier.select.refit import Selection

FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def inner_pairs() -> list[Pair]:
    """The inner channels of each of the nine blocks."""
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    return [Pair((f"{n}.conv1",), (f"{n}.conv2",), (f"{n}.bn1",), f"{n}.bn2") for n in names]


def load_dense() -> CifarResNet:
    """The trained checkpoint under ESPALIER_DATA, in eval mode."""
    root = os.environ.get("ESPALIER_DATA")
    if not root:
        raise FileNotFoundError("set ESPALIER_DATA to the folder that holds checkpoints/")
    model = resnet20()
    model.load_state_dict(load_file(Path(root) / "checkpoints" / "resnet20-cifar10.safetensors"))
    return model.eval()


def cifar(split: str, first: int | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-10 images [n, 3, 32, 32] scaled to [−1, 1], and labels."""
    images, labels = load_images("cifar10", split, first)
    if images.shape[-1] == 3:
        images = images.movedim(-1, 1)
    return ((images - 0.5) / 0.5).contiguous(), labels


def ranked(
    model: nn.Module, pairs: Sequence[Pair], scores: Sequence[Tensor], sizes: Sequence[int]
) -> list[LayerResult]:
    """Keep the highest scores of every pair with their dense weights."""
    results = []
    for pair, score, size in zip(pairs, scores, sizes, strict=True):
        support = score.topk(size).indices.sort().values
        weight: Tensor = model.get_submodule(pair.consumers[0]).weight  # type: ignore[assignment]
        dense = weight.detach().double().flatten(1)
        kept = dense.view(len(dense), len(score), -1)[:, support].flatten(1)
        selection = Selection(support, kept, None, float("nan"), 1.0)
        results.append(LayerResult(pair, len(score), pair.block(model), selection))
    return results


def baseline_scores(name: str, model: CifarResNet, x: Tensor, y: Tensor, seed: int) -> list[Tensor]:
    """Scores of each block's inner channels: "random", "magnitude" (filter norm) or "taylor" (first
    order)."""
    blocks = [model.get_submodule(pair.producers[0].rpartition(".")[0]) for pair in inner_pairs()]
    assert all(isinstance(block, BasicBlock) for block in blocks)
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(b.conv1.weight.shape[0], generator=generator) for b in blocks]  # type: ignore[union-attr]
    if name == "magnitude":
        return [b.conv1.weight.detach().flatten(1).norm(dim=1) for b in blocks]  # type: ignore[union-attr]
    model.zero_grad()
    for images, labels in zip(x.split(200), y.split(200), strict=True):
        functional.cross_entropy(model(images), labels, reduction="sum").backward()
    scores = []
    for b in blocks:
        norm: nn.BatchNorm2d = b.bn1  # type: ignore[assignment]
        assert norm.weight.grad is not None
        assert norm.bias.grad is not None
        scores.append((norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach().abs())
    model.zero_grad()
    return scores


def uniform_sizes(units: Sequence[int], cost: Callable[[Sequence[int]], float], budget: float) -> list[int]:
    """The largest common fraction of every block's inner channels whose cost meets the budget."""
    for step in range(1000, 0, -1):
        sizes = [max(1, int(n * step / 1000)) for n in units]
        if cost(sizes) <= budget:
            return sizes
    raise ValueError("the budget cannot be met by inner channels alone")


def selections(
    model: CifarResNet,
    batches: Sequence[Tensor],
    moments: Mapping[str, Moments],
    labelled: tuple[Tensor, Tensor],
    fraction: float,
    uniform: Sequence[int],
    seed: int,
) -> dict[str, Callable[[], list[LayerResult]]]:
    """Every method of the table at one budget; only "taylor" looks at labels."""
    pairs = inner_pairs()

    def baseline(name: str) -> Callable[[], list[LayerResult]]:
        return lambda: ranked(model, pairs, baseline_scores(name, model, *labelled, seed), uniform)

    def ours(method: str = "omp", sequential: bool = True, even: bool = False) -> Callable[[], list[LayerResult]]:
        sizes, macs = (uniform, None) if even else (None, fraction)
        return lambda: prune_layers(
            model,
            pairs,
            batches,
            sizes=sizes,
            macs=macs,
            method=method,
            sequential=sequential,
            moments=moments,
        )

    return {
        **{name: baseline(name) for name in ("random", "magnitude", "taylor")},
        "ispasp": ours("ispasp", sequential=False, even=True),
        "omp (dense inputs)": ours(sequential=False),
        "omp": ours(),
        "omp (uniform)": ours(even=True),
        "backward": ours("backward"),
    }


def resnet(
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    images: int = 1000,
    fractions: Sequence[float] = FRACTIONS,
    methods: Sequence[str] | None = None,
    finetune: int = 0,
) -> None:
    """Test accuracy of every method and budget, as pruned, after recalibrating batch norms and, with `finetune`
    labelled images, after one epoch on these (from the better of the two networks)."""
    results = Results(out)
    model, pairs = load_dense(), inner_pairs()
    x, y = cifar("train")
    test_x, test_y = cifar("test")
    units = [pair.count(model) for pair in pairs]
    cost = mac_cost(model, [(n, (*p.producers, *p.consumers)) for n, p in zip(units, pairs, strict=True)], x[:1])
    full = cost(units)
    if not results.done(method="dense"):
        results.add(method="dense", macs=1.0, accuracy=accuracy(model, test_x, test_y), multiply_adds=full)
    for seed in seeds:
        pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:images]
        batches = list(x[pick].split(200))
        statistics = list(x[pick].split(250))
        started = time.perf_counter()
        moments = collect(model, [pair.consumers[0] for pair in pairs], batches)
        if not results.done(method="moments", seed=seed):
            results.add(method="moments", seed=seed, seconds=round(time.perf_counter() - started, 1))
        for fraction in fractions:
            uniform = uniform_sizes(units, cost, fraction * full)
            found_by = selections(model, batches, moments, (x[pick], y[pick]), fraction, uniform, seed)
            for name, method in found_by.items():
                if results.done(method=name, macs=fraction, seed=seed) or name not in (methods or found_by):
                    continue
                started = time.perf_counter()
                found = method()
                spent = time.perf_counter() - started
                small = narrow(model, found)
                sizes = [len(r.selection.support) for r in found]
                refitted = name not in ("random", "magnitude", "taylor")
                again = copy.deepcopy(small)
                recalibrate(again, statistics, samples=sum(map(len, statistics)), batch=len(statistics[0]))
                pruned = accuracy(small, test_x, test_y) if refitted else None
                recalibrated = accuracy(again, test_x, test_y)
                start = small if pruned is not None and pruned > recalibrated else again
                after = (
                    accuracy(finetuned(start, x, y, images=finetune, seed=seed), test_x, test_y) if finetune else None
                )
                results.add(
                    method=name,
                    macs=fraction,
                    seed=seed,
                    reached=cost(sizes) / full,
                    sizes=sizes,
                    pruned=pruned,
                    recalibrated=recalibrated,
                    finetuned=after,
                    seconds=round(spent, 1),
                )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    parser.add_argument("--fractions", type=float, nargs="+", default=list(FRACTIONS))
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--finetune", type=int, default=0, help="labelled images for one epoch after pruning")
    resnet(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
