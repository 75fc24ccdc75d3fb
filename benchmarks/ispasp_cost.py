"""Time and peak memory of selection against hidden width and calibration size, data form against moment form.

``python benchmarks/ispasp_cost.py --out docs/results/ispasp/cost.jsonl``. Every cell runs in a process of
its own, so that its peak memory is its own; the problem (weights, activations) depends only on the cell's
width, outputs and samples, so that all methods see the same one. Finished cells are skipped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from espalier.curvature.moments import Moments
from espalier.select.auxiliary import PAPER, BatchedReconstruction, auxiliary, run
from espalier.select.backward import backward_path
from espalier.select.ispasp import ispasp, ispasp_from_data
from espalier.select.omp import omp_path
from espalier.select.refit import from_moments

BATCH = 500
METHODS = (
    "ispasp-data",
    "ispasp-moments",
    "omp-moments",
    "backward-moments",
    "five-step-data",
    "five-step-moments",
)


def batches(width: int, samples: int) -> Iterator[Tensor]:
    """Correlated nonnegative activations [BATCH, width], float32, the same in every pass."""
    generator = torch.Generator().manual_seed(width)
    mix = torch.randn(64, width, generator=generator)
    for _ in range(0, samples, BATCH):
        code = torch.randn(BATCH, 64, generator=generator)
        yield (code @ mix / 8 + 0.3 * torch.randn(BATCH, width, generator=generator)).relu()


def measure(method: str, width: int, outputs: int, samples: int, iterations: int) -> dict[str, float]:
    """Processor seconds (one thread, without making the activations) and peak MiB above the imports."""
    weight = torch.randn(outputs, width, generator=torch.Generator().manual_seed(1)) / outputs**0.5
    size = width // 4
    _ = torch.rand(600, 600) @ torch.rand(600, 600)  # loads the linear algebra library
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    making = gathering = 0.0
    if method.endswith("-data"):
        # the data form needs H in every pass
        held = [batch.T.contiguous() for batch in batches(width, samples)]
        started = time.process_time()
        if method == "ispasp-data":
            ispasp_from_data(weight, lambda: held, size, iterations=iterations)
        else:
            run(BatchedReconstruction(weight, lambda: held), size, PAPER)
    else:
        moments = Moments.zeros(width)
        started = time.process_time()
        source = batches(width, samples)
        while True:
            clock = time.process_time()
            batch = next(source, None)
            making += time.process_time() - clock
            if batch is None:
                break
            if method == "ispasp-moments":  # the published choice needs the row sums only
                moments.sums += batch.double().sum(0)
                moments.count += len(batch)
            else:
                moments.add(batch)
        gathering = time.process_time() - started - making
        if method == "ispasp-moments":
            moments.gram.diagonal().add_(1.0)  # not used by the choice
            ispasp(from_moments(moments, weight, centred=False), size, iterations=iterations)
        elif method == "omp-moments":
            omp_path(from_moments(moments, weight), size)
        elif method == "backward-moments":
            backward_path(from_moments(moments, weight), 1)
        else:
            auxiliary(from_moments(moments, weight, centred=False), size, PAPER)
    total = time.process_time() - started - making
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": total, "gathering": gathering, "peak_mib": peak / 1024}


def too_long(method: str, width: int, outputs: int) -> bool:
    """Cells of more than about two minutes on one thread, which are left out."""
    if method == "five-step-data":
        return width * outputs > 1024**2
    if method == "ispasp-data":
        return width * outputs > 2048**2
    return outputs == width > 4096 and not method.startswith("ispasp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--samples", type=int, nargs="+", default=[2500, 5000, 10000, 20000])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--cell", nargs=4, metavar=("METHOD", "WIDTH", "OUTPUTS", "SAMPLES"), help="run one cell")
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(json.loads(line)["cell"]) for line in out.read_text().splitlines()} if out.exists() else set()
    cells = [(width, 10_000) for width in options.widths]
    cells += [(1024, samples) for samples in options.samples if (1024, samples) not in cells]
    for width, samples in cells:
        for outputs in (10, width) if samples == 10_000 else (width,):
            for method in options.methods:
                cell = (method, width, outputs, samples)
                if cell in done or too_long(method, width, outputs):
                    continue
                with context.Pool(1) as worker:
                    row = worker.apply(measure, (*cell, 20))
                with out.open("a") as file:
                    file.write(json.dumps({"cell": cell, **row}) + "\n")


if __name__ == "__main__":
    main()
