"""The table and the picture of ``espalier.experiments.sparse_methods``: accuracy against MACs, by method.

    python -m espalier.experiments.sparse_methods_report runs/sparse_methods/*.jsonl --picture sparse_methods.png

The table goes to standard output as Markdown. ``--picture`` needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from espalier.experiments.sparse_methods import METHODS
from espalier.experiments.spread import spread

Line = dict[str, Any]


def read(paths: list[Path]) -> list[Line]:
    """The lines of all files, in the order of methods, budgets (largest first) and seeds."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: (METHODS.index(line["method"]), -line["budget"], line["seed"]))


def table(lines: list[Line]) -> str:
    """Markdown of all runs: means, and sample deviations where there are several seeds.

    >>> line = {"method": "ramda", "strength": 0.1, "seed": 0, "budget": 0.5, "own_macs": 0.7, "own_accuracy": 88.0}
    >>> print(table([line | {"cut_accuracy": 85.0, "accuracy": 87.5, "cpu_s": 9.0}]))
    | method | strength | seeds | itself: MACs left, accuracy % | ≤ 0.5 | CPU s |
    | --- | --- | --- | --- | --- | --- |
    | ramda | 0.1 | 1 | 0.700, 88.00 | 85.00 → 87.50 | 9 |
    """
    budgets = sorted({line["budget"] for line in lines}, reverse=True)
    head = ("method", "strength", "seeds", "itself: MACs left, accuracy %", *(f"≤ {b:g}" for b in budgets), "CPU s")
    rows = [head, ("---",) * len(head)]
    for method in dict.fromkeys(line["method"] for line in lines):
        runs = [line for line in lines if line["method"] == method]
        by_budget = [[run for run in runs if run["budget"] == b] for b in budgets]
        first = by_budget[0]  # what a training leaves is the same in the lines of all its budgets, but for H2SPG's
        own = f"{_spread(first, 'own_macs', 3)}, {_spread(first, 'own_accuracy')}"
        if method == "h2spg":
            own = "the budget"
        cells = [_cell(chosen) for chosen in by_budget]
        seeds = str(len({run["seed"] for run in runs}))
        rows.append((method, f"{runs[0]['strength']:g}", seeds, own, *cells, f"{mean(r['cpu_s'] for r in runs):.0f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(runs: list[Line]) -> str:
    return f"{_spread(runs, 'cut_accuracy')} → {_spread(runs, 'accuracy')}" if runs else ""


def _spread(runs: list[Line], key: str, digits: int = 2) -> str:
    return spread((run[key] for run in runs), digits)


def draw(lines: list[Line], out: Path) -> None:
    """Accuracy after fine-tuning against MACs left, a curve per method, a bar for the spread of its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(dict.fromkeys(line["method"] for line in lines)):
        runs = [line for line in lines if line["method"] == method]
        x, middle, low, high = [], [], [], []
        for budget in sorted({run["budget"] for run in runs}):
            chosen = [run for run in runs if run["budget"] == budget]
            found = [run["accuracy"] for run in chosen]
            x.append(mean(run["macs"] for run in chosen))
            middle.append(mean(found))
            low.append(middle[-1] - min(found))
            high.append(max(found) - middle[-1])
        shifted = [value * 1.012 ** (i - 3.5) for value in x]  # bars side by side
        axes.errorbar(shifted, middle, yerr=(low, high), marker="o", markersize=4, capsize=2, label=method)
    axes.set_xscale("log")
    axes.set_xlabel("MACs left, share of the full network's")
    axes.set_ylabel("test accuracy after fine-tuning, %")
    ticks = sorted({line["budget"] for line in lines})
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    lines = read(args.logs)
    print(table(lines))
    if args.picture is not None:
        draw(lines, args.picture)


if __name__ == "__main__":
    main()
