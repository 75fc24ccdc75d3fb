"""All solvers of problem (5) on the same instances, in one run: objective and CPU time.

    ESPALIER_DATA=… python benchmarks/chita_solvers.py --network mlpnet --out runs/solvers.jsonl
    python benchmarks/chita_solvers.py --table --out runs/solvers.jsonl

Instances: n = 500 single-sample gradients at the dense weights, no first-order term (MLPNet λ = 1e-3,
ResNet-20 λ = 1e-4). Times are CPU seconds of one thread, from the tensors to the result, including the check
of the data and the float64 recomputation of the objective; the best of `repeats` runs. `matvec_gb_per_s` is
the rate at which one plain matrix-vector product reads A at the time, `a_reads` how often a solve reads all of A:
the bytes of A that its operators read, counted in one more run, over the bytes that A has. `--only exchange IHT` picks
solvers. `--reference CHECKOUT` times the authors' code in the same run (a clone of github.com/mazumder-lab/CHITA, read,
not changed; needs numba): their back-solve of the largest weights in float32, and their IHT of at most 50 iterations in
float64 (the conversion of A is not timed) with their back-solve after it, as in the paper's Figure 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.curvature.gradients import GradientOptions, gradients
from espalier.experiments.chita_task import load_task
from espalier.select import cbs, chita, mfac, objective, woodfisher
from espalier.select.result import Result

INSTANCES = {"mlpnet": (1e-3, (0.5, 0.7, 0.9, 0.95, 0.98)), "resnet20": (1e-4, (0.5, 0.7, 0.9))}


class Reads(TorchDispatchMode):
    """Counts the bytes of one tensor that operators read; views of it cost nothing, a gather what it takes out."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.place, self.bytes = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        view = isinstance(out, Tensor) and out.untyped_storage().data_ptr() == self.place
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and not view and leaf.untyped_storage().data_ptr() == self.place:
                taken = out if func in (torch.ops.aten.index_select.default, torch.ops.aten.index.Tensor) else leaf
                self.bytes += taken.numel() * leaf.element_size()
        return out


def authors(checkout: Path, A: Tensor, w_bar: Tensor, ridge: float) -> dict[str, Callable[[int], Any]]:
    """The authors' solvers by name, as their pruner calls them; each takes k."""
    sys.path.insert(0, str(checkout))
    from CHITA_opt import L0_card_const as theirs  # pyright: ignore[reportMissingImports]

    p, lambda2 = len(w_bar), ridge * len(A) / 2
    single = A.numpy(), w_bar.numpy()
    double = tuple(a.astype(np.float64) for a in single)

    def least_squares(k: int) -> Any:
        X, w = single
        zeros = np.zeros_like(w)
        found, *_ = theirs.Heuristic_LS(X @ w, X, w, k, zeros, 0, lambda2, zeros, w.copy(), use_prune=True)
        return SimpleNamespace(weights=torch.from_numpy(found), info={})

    def iht(k: int) -> Any:
        X, w = double
        y, zeros = X @ w, np.zeros(p)
        options = {"lambda1": 0, "lambda2": lambda2, "beta_tilde1": zeros, "beta_tilde2": w.copy(), "iht_max_itr": 50}
        options |= {"ftol": 1e-7, "act_max_itr": 50, "kimp": 1.5, "sea1_max_itr": 5, "sea2_max_itr": 10}
        with contextlib.redirect_stdout(io.StringIO()):  # a line per iteration
            found, *_ = theirs.Active_IHTCDLS_PP(y, X, w.copy(), k, alpha=zeros, **options)
        kept = np.flatnonzero(found)
        found = np.zeros(p)
        found[kept] = theirs.compute_inverse(y, X[:, kept], zeros[kept], lambda2, w[kept])
        return SimpleNamespace(weights=torch.from_numpy(found), info={})

    return {"authors: LS": least_squares, "authors: IHT, back-solve": iht}


def timed(solve: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.process_time()
        result = solve()
        best = min(best, time.process_time() - began)
    assert result is not None
    return result, best


def tables(lines: list[dict[str, Any]]) -> str:
    """Markdown, a table per network: objective (CPU seconds; how often all of A is read)."""
    parts = []
    for network in dict.fromkeys(line["network"] for line in lines):
        own = {(line["solver"], line["sparsity"]): line for line in lines if line["network"] == network}
        sparsities = sorted({sparsity for _, sparsity in own})
        rows = [f"| {network} | {' | '.join(map(str, sparsities))} |", "|-|" + "-|" * len(sparsities)]
        for solver in dict.fromkeys(solver for solver, _ in own):
            cells = [_cell(own[solver, s]) if (solver, s) in own else "" for s in sparsities]
            rows.append(f"| {solver} | {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _cell(line: dict[str, Any]) -> str:
    reads = f"; {line['a_reads']:.1f}" if "a_reads" in line else ""
    return f"{line['objective']:.4f} ({line['cpu_seconds']:.2f}{reads})"


def main(
    network: Literal["mlpnet", "resnet20"] = "mlpnet",
    n: int = 500,
    repeats: int = 3,
    only: tuple[str, ...] = (),
    sparsities: tuple[float, ...] = (),
    seed: int = 0,
    reference: Path | None = None,
    table: bool = False,
    out: Path = Path("runs/chita-solvers.jsonl"),
) -> None:
    if table:
        print(tables([json.loads(line) for line in out.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    task = load_task(network)
    ridge, usual = INSTANCES[network]
    index = torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(seed))[:n]
    sample, loss = (task.train[0][index], task.train[1][index]), nn.functional.cross_entropy
    began = time.process_time()
    found = gradients(task.model, loss, sample, n, 1, task.prunable, GradientOptions())
    gradient_seconds = time.process_time() - began
    A, w_bar, sizes = found.A, found.w_bar, tuple(found.layout.sizes)
    y = torch.randn(n)
    began = time.process_time()
    for _ in range(5):
        A.t() @ y
    bandwidth = 5 * A.numel() * 4 / (time.process_time() - began) / 1e9
    out.parent.mkdir(parents=True, exist_ok=True)
    peers = authors(reference, A, w_bar, ridge) if reference else {}
    for sparsity in sparsities or usual:
        k = int((1 - sparsity) * len(w_bar))
        solvers = {
            "magnitude + refit": lambda k=k: chita(A, None, w_bar, k, ridge, solver="magnitude"),
            "exchange (default)": lambda k=k: chita(A, None, w_bar, k, ridge),
            "IHT (paper)": lambda k=k: chita(A, None, w_bar, k, ridge, solver="iht"),
        }
        solvers |= {
            "M-FAC (recursion)": lambda k=k: mfac(A, w_bar, k, ridge, recursion=True),
            "M-FAC (dual)": lambda k=k: mfac(A, w_bar, k, ridge),
            "WoodFisher (blocks of 2000)": lambda k=k: woodfisher(A, w_bar, k, ridge, sizes=sizes),
            "CBS": lambda k=k: cbs(A, w_bar, k, ridge),
        }
        solvers |= {name: lambda k=k, solve=solve: solve(k) for name, solve in peers.items()}
        for name, solve in solvers.items():
            if only and name.split(" (")[0] not in only:
                continue
            result, seconds = timed(solve, repeats)
            checked = objective(A, None, w_bar, result.weights, ridge)
            line = {"network": network, "n": n, "sparsity": sparsity, "solver": name, "objective": checked}
            line |= {"cpu_seconds": seconds, "info": result.info, "gradients_cpu_seconds": gradient_seconds}
            line |= {"matvec_gb_per_s": bandwidth, "a_bytes": A.numel() * A.element_size()}
            if name not in peers:
                with Reads(A) as reads:
                    solve()
                line["a_reads"] = reads.bytes / line["a_bytes"]
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
