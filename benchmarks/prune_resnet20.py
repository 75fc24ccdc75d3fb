"""One call of espalier.prune on a trained ResNet-20: every saliency with every ranking, no fine-tuning.

    ESPALIER_DATA=… python benchmarks/prune_resnet20.py            # resumes
    python benchmarks/prune_resnet20.py --table                    # only writes docs/results/prune.md

The dense checkpoint, CIFAR-10. Gradients and batch-norm statistics come from 1,024 training images, accuracy from
the 10,000 test images, looked at once per row; the defaults of the library were chosen on training images.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

import espalier
from espalier import Budget
from espalier.experiments.channels_resnet20 import Recipe, accuracy, images
from espalier.experiments.ispasp_resnet import load_dense

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "runs" / "prune_resnet20.jsonl"
PAGE = ROOT / "docs" / "results" / "prune.md"
SALIENCIES = ("group_norm", "magnitude", "taylor", "bn_scale", "relative", "cosine_magnitude", "random")
RANKINGS = ("global", "local", "isomorphic")
SHARES = (0.8, 0.6, 0.4)
GRADIENTS = ("taylor", "cosine_magnitude")


def recalibrate(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Running averages anew, from these batches."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    model.eval()


def write() -> None:
    """The page."""
    found = {(r["saliency"], r["ranking"], r["share"]): r for r in map(json.loads, RECORDS.read_text().splitlines())}
    lines = [
        "# One-shot pruning of ResNet-20",
        "",
        *(__doc__ or "").split("\n")[2:],
        f"2-core x86 CPU, torch {torch.__version__.split('+')[0]}, 2026-11-21. Test accuracy, per cent, with 80, 60",
        "and 40 % of the MACs; *parameters* at 60 %.",
        "",
        "| saliency | ranking | 80 % | 60 % | 40 % | parameters |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for saliency in SALIENCIES:
        for ranking in RANKINGS:
            rows = [found.get((saliency, ranking, share)) for share in SHARES]
            if all(rows):
                cells = [f"{r['accuracy']:.1f}" for r in rows if r]
                lines.append(f"| {saliency} | {ranking} | {' | '.join(cells)} | {(rows[1] or {})['params']:.2f} |")
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    if parser.parse_args().table:
        write()
        return
    RECORDS.parent.mkdir(exist_ok=True)
    lines = map(json.loads, RECORDS.read_text().splitlines()) if RECORDS.exists() else ()
    done = {(r["saliency"], r["ranking"], r["share"]) for r in lines}
    x, y = images("train", Recipe()).tensors()
    batches = list(zip(x[:1024].split(128), y[:1024].split(128), strict=True))
    test = images("test", Recipe()).tensors()
    dense = load_dense().eval()
    full = sum(p.numel() for p in dense.parameters())
    for share in SHARES:
        for saliency in SALIENCIES:
            for ranking in RANKINGS:
                if (saliency, ranking, share) in done:
                    continue
                start = time.perf_counter()
                small = espalier.prune(
                    dense, x[:2], budget=Budget(macs=share), saliency=saliency, ranking=ranking, levels=("channel",),
                    data=batches if saliency in GRADIENTS else None,
                )  # fmt: skip
                seconds = time.perf_counter() - start
                recalibrate(small, batches)
                record = {
                    "saliency": saliency, "ranking": ranking, "share": share, "accuracy": accuracy(small, *test),
                    "params": sum(p.numel() for p in small.parameters()) / full, "prune_s": round(seconds, 2),
                }  # fmt: skip
                with RECORDS.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    write()


if __name__ == "__main__":
    main()
