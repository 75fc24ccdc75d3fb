"""Dense against compressed rows (CSR) for one linear layer on the CPU: where torch's sparse layout is faster.

python benchmarks/chita_sparse.py
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import nn

from espalier.select.sparse import SparseLinear, seconds


def main(
    widths: tuple[int, ...] = (256, 1024, 4096),
    batches: tuple[int, ...] = (1, 32, 256),
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99),
    out: Path = Path("runs/chita-sparse.jsonl"),
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = ["| width, batch | dense, ms | " + " | ".join(f"CSR {s}" for s in sparsities) + " |"]
    rows.append("|-|-|" + "-|" * len(sparsities))
    with torch.no_grad(), out.open("a") as file:
        for width in widths:
            for batch in batches:
                layer, x = nn.Linear(width, width), torch.randn(batch, width)
                repeats = max(5, int(2e9 / (width * width * batch)) if width * width * batch > 1e6 else 200)
                dense, cells = seconds(partial(layer, x), min(repeats, 200)), []
                for sparsity in sparsities:
                    pruned = nn.Linear(width, width)
                    pruned.weight.mul_(torch.rand(width, width) >= sparsity)
                    sparse = seconds(partial(SparseLinear(pruned), x), min(repeats, 200))
                    cells.append(f"**{1e3 * sparse:.3f}**" if sparse < dense else f"{1e3 * sparse:.3f}")
                    line = {"width": width, "batch": batch, "sparsity": sparsity, "dense_s": dense, "csr_s": sparse}
                    file.write(json.dumps(line) + "\n")
                rows.append(f"| {width}, {batch} | {1e3 * dense:.3f} | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
