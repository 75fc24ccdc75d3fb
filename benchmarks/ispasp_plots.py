"""Plots and tables of the i-SpaSP results: ``python benchmarks/ispasp_plots.py docs/results/ispasp``.

Reads the JSON lines that the experiments wrote there, writes PNG files beside them and prints Markdown
tables.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from espalier.experiments.ispasp import POWERS, finite_tail, slope, synthetic_problem
from espalier.select.ispasp import residual_bound

COLOURS = dict(
    zip(
        [
            "random",
            "magnitude",
            "ispasp",
            "gfs",
            "random+refit",
            "magnitude+refit",
            "ispasp+refit",
            "gfs+refit",
            "auxiliary (norms, from zero)",
            "auxiliary (scaled)",
            "auxiliary (pcg)",
            "auxiliary (exact)",
            "omp",
            "backward",
        ],
        [
            *("tab:gray", "tab:olive", "tab:blue", "tab:cyan") * 2,
            *("tab:pink", "tab:purple", "tab:brown", "tab:orange", "tab:red", "tab:green"),
        ],
        strict=True,
    )
)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(header: list[str], body: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for line in body:
        print("| " + " | ".join(line) + " |")
    print()


def figure3(folder: Path) -> None:
    found = rows(folder / "figure3.jsonl")
    grid, axes = plt.subplots(2, 4, figsize=(13, 6), sharex="row")
    slopes: list[list[str]] = []
    for row, d in zip(axes, (100, 200), strict=True):
        for axis, p in zip(row, POWERS, strict=True):
            cell = [r for r in found if r["d"] == d and r["p"] == p]
            if not cell:
                continue
            sizes = cell[0]["sizes"]
            line = [str(d), str(p), f"{slope(sizes, finite_tail(d, p), 4, d // 4):.2f}"]
            for name in cell[0]["errors"]:
                values = np.exp(np.mean([np.log(np.maximum(r["errors"][name], 1e-30)) for r in cell], axis=0))
                style = "--" if name.endswith("+refit") else "-"
                axis.loglog(sizes, values, style, label=name, lw=1.1, color=COLOURS.get(name))
                each = [slope(sizes, r["errors"][name], 4, d // 4) for r in cell]
                line.append(f"{np.mean(each):.2f}")
            slopes.append(line)
            weight = synthetic_problem(d, p, 0).weight
            bound = [residual_bound(weight, 1.0, p, s) ** 2 for s in sizes]
            axis.loglog(sizes, bound, ":", color="black", lw=0.9, label="bound")
            axis.set_title(f"d = {d}, p = {p}", fontsize=9)
            axis.set_ylim(bottom=max(1e-16, 1e-2 * finite_tail(d, p)[int(0.9 * d)]))
    axes[0, 0].set_ylabel("squared residual")
    axes[1, 0].set_ylabel("squared residual")
    axes[1, 0].set_xlabel("size s")
    axes[0, 3].legend(fontsize=6)
    save(grid, folder / "figure3.png")
    names = list(found[0]["errors"]) if found else []
    print("Slopes, s from 4 to d/4, mean of the seeds\n")
    table(["d", "p", "finite tail", *names], slopes)


def mnist(folder: Path, hidden: int) -> None:
    found = rows(folder / f"mnist-{hidden}.jsonl")
    cells: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        if "relative_error" in row:
            cells[row["method"], row["size"]].append(row)
    if not cells:
        return
    dense = [row["before"] for row in found if row["method"] == "dense"]
    print(f"{hidden} hidden, dense {np.mean(dense):.2f} ({len(dense)} seeds)\n")
    methods = list(dict.fromkeys(method for method, _ in cells))
    sizes = sorted({size for _, size in cells})
    for number, field in ((1, "before"), (2, "after")):
        grid, axis = plt.subplots(figsize=(6.5, 4.5))
        body = []
        for method in methods:
            have = [size for size in sizes if (method, size) in cells]
            values = [[row[field] for row in cells[method, size]] for size in have]
            style = "--" if method.endswith("+refit") else "-"
            axis.errorbar(
                have,
                [np.mean(v) for v in values],
                [np.std(v) for v in values],
                label=method,
                lw=1.1,
                ls=style,
                color=COLOURS[method],
            )
            text = {s: f"{np.mean(v):.1f} ± {np.std(v):.1f}" for s, v in zip(have, values, strict=True)}
            body.append([method, *(text.get(size, "") for size in sizes)])
        axis.axhline(float(np.mean(dense)), color="black", lw=0.8, ls=":")
        axis.set_xscale("log")
        axis.set_xlabel(f"neurons kept of {hidden}")
        axis.set_ylabel(f"test accuracy (%), {field} fine-tuning")
        axis.set_ylim(None if field == "before" else (float(np.mean(dense)) - 12, 99))
        axis.legend(fontsize=6)
        save(grid, folder / f"figure{number}-{hidden}.png")
        print(f"Test accuracy (%) {field} fine-tuning\n")
        table(["method", *map(str, sizes)], body)
    seconds = [
        [
            m,
            *(f"{np.mean([r['seconds'] for r in cells[m, s]]):.2f}" if (m, s) in cells else "" for s in sizes),
        ]
        for m in methods
    ]
    print("Seconds of selection after the moments (paths are computed once, at the first size)\n")
    table(["method", *map(str, sizes)], seconds)


def budgets(folder: Path, file: str, title: str, fields: tuple[str, ...]) -> None:
    """`oneshot` is the network as pruned, or, for those without a refit, with norms recalibrated where it has them."""
    found = [row for row in rows(folder / f"{file}.jsonl") if "pruned" in row]
    cells: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        one = row["pruned"] if row["pruned"] is not None else row["recalibrated"]
        cells[row["method"], row["macs"]].append({**row, "oneshot": one})
    if not cells:
        return
    methods = list(dict.fromkeys(method for method, _ in cells))
    fractions = sorted({macs for _, macs in cells}, reverse=True)

    def values(method: str, fraction: float, field: str) -> list[float]:
        return [row[field] for row in cells.get((method, fraction), []) if row.get(field) is not None]

    def shown(method: str, fraction: float, field: str) -> str:
        found = values(method, fraction, field)
        spread = f" ± {np.std(found):.1f}" if len(found) > 1 else ""
        return f"{np.mean(found):.1f}{spread}" if found else ""

    pictures = ("oneshot", "finetuned")
    grid, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, field in zip(axes, pictures, strict=True):
        for method in methods:
            have = [f for f in fractions if values(method, f, field)]
            means = [np.mean(values(method, f, field)) for f in have]
            axis.plot([100 * (1 - f) for f in have], means, marker="o", ms=3, lw=1.1, label=method)
        axis.set_xlabel("multiply-adds removed (%)")
        axis.set_title({"oneshot": "without fine-tuning", "finetuned": "after equal fine-tuning"}[field], fontsize=10)
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].legend(fontsize=7)
    save(grid, folder / f"{file}.png")
    header = ["method", *(f"{100 * (1 - f):.0f} % fewer" for f in fractions)]
    for field in (*fields, "finetuned", "seconds"):
        print(f"{title}, {field}\n")
        table(header, [[m, *(shown(m, f, field) for f in fractions)] for m in methods])


def cost(folder: Path) -> None:
    found = rows(folder / "cost.jsonl")
    if not found:
        return
    cells = {tuple(row["cell"]): row for row in found}
    grid, axes = plt.subplots(1, 3, figsize=(13, 4))
    methods = list(dict.fromkeys(cell[0] for cell in cells))
    every = sorted({cell[1] for cell in cells if cell[3] == 10_000})
    body = []
    for method in methods:
        for wide in (False, True):
            chosen = sorted(c for c in cells if c[0] == method and c[3] == 10_000 and (c[2] == c[1]) == wide)
            widths = [c[1] for c in chosen]
            times = [cells[c]["seconds"] for c in chosen]
            peaks = [cells[c]["peak_mib"] for c in chosen]
            style = "-" if wide else ":"
            label = f"{method}, outputs {'d' if wide else '10'}"
            axes[0].loglog(widths, times, style, marker="o", ms=3, label=label)
            if wide:
                axes[1].loglog(widths, peaks, style, marker="o", ms=3, label=label)
                by_samples = sorted(c for c in cells if c[0] == method and c[1] == 1024 and c[2] == 1024)
                samples, memory = [c[3] for c in by_samples], [cells[c]["peak_mib"] for c in by_samples]
                axes[2].loglog(samples, memory, marker="o", ms=3, label=method)
            bends = [
                f"{np.polyfit(np.log(widths), np.log(values), 1)[0]:.2f}" if len(widths) > 1 else ""
                for values in (times, peaks)
            ]
            text = {c[1]: f"{cells[c]['seconds']:.2f} s, {cells[c]['peak_mib']:.0f} MiB" for c in chosen}
            body.append([method, "d" if wide else "10", *(text.get(width, "") for width in every), *bends])
    for axis, words in zip(axes, ("seconds", "peak MiB (outputs d)", "peak MiB, d = 1024"), strict=True):
        axis.set_ylabel(words)
    axes[0].set_xlabel("hidden width d")
    axes[1].set_xlabel("hidden width d")
    axes[2].set_xlabel("calibration samples")
    axes[0].legend(fontsize=5)
    axes[2].legend(fontsize=6)
    save(grid, folder / "cost.png")
    table(["method", "outputs", *map(str, every), "time slope", "memory slope"], body)
    samples = sorted({c[3] for c in cells if c[1] == 1024})
    lines = [
        [
            m,
            *(
                f"{cells[c]['seconds']:.2f} s, {cells[c]['peak_mib']:.0f} MiB"
                if (c := (m, 1024, 1024, n)) in cells
                else ""
                for n in samples
            ),
        ]
        for m in methods
    ]
    table(["method, d = outputs = 1024", *(f"{n} samples" for n in samples)], lines)


def save(grid: Any, path: Path) -> None:
    grid.tight_layout()
    grid.savefig(path, dpi=80)
    plt.close(grid)


def main() -> None:
    folder = Path(sys.argv[1])
    figure3(folder)
    for hidden in (1000, 10_000):
        mnist(folder, hidden)
    budgets(folder, "resnet20", "ResNet-20", ("pruned", "recalibrated"))
    budgets(folder, "vit", "Small ViT", ("pruned",))
    cost(folder)


if __name__ == "__main__":
    main()
