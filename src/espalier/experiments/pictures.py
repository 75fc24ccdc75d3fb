"""What a recipe draws: accuracies as a plot, search spaces as graphs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from espalier.experiments.config import Run
from espalier.experiments.networks import build
from espalier.experiments.recipe import Recipe
from espalier.experiments.splits import splits
from espalier.report.html import write_text
from espalier.report.overview import draw_space
from espalier.space.search_space import SearchSpace, search_space

__all__ = ["draw_runs", "plot_rows"]

_AXES = {
    "params": "parameters of the sub-network",
    "sparsity": "structures removed, as a fraction",
    "search": "search phase, as a share of all steps",
    "search_lr": "learning rate of the search phase",
}


def plot_rows(recipe: Recipe, done: Sequence[tuple[Run, Mapping[str, Any]]], path: Path, console: Console) -> None:
    """Test accuracy of every run against the recipe's axis, one colour per method; a line joins the means."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        console.print("[yellow]No plot: it needs matplotlib. pip install 'espalier\\[experiments]'[/]")
        return
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[tuple[float, float]]] = {}
    for run, line in done:
        if "refused" in line or (run.method == "full" and recipe.axis == "sparsity"):
            continue
        value = line["params"] if recipe.axis == "params" else getattr(run, recipe.axis)
        name = f"{run.network}, {run.method}" if recipe.axis == "params" else run.way
        name += ", skips and pools removable" if run.parameterless else ""
        series.setdefault(name, []).append((float(value), float(line["test"])))
    for name, points in series.items():
        places = sorted({x for x, _ in points})
        means = [sum(y for x, y in points if x == at) / sum(x == at for x, _ in points) for at in places]
        (drawn,) = axes.plot(places, means, marker="o", markersize=3.5, linewidth=1.2, label=name)
        axes.plot([x for x, _ in points], [y for _, y in points], "x", markersize=4, color=drawn.get_color())
    full = [line["test"] for run, line in done if run.method == "full" and "test" in line]
    if full and recipe.axis == "sparsity":
        axes.axhline(sum(full) / len(full), color="0.5", linewidth=1, linestyle=":", label="full network")
    if recipe.axis == "search_lr":
        axes.set_xscale("log")
    axes.set_xlabel(_AXES[recipe.axis])
    axes.set_ylabel("top-1 accuracy on the test set, per cent")
    axes.set_title(recipe.title, fontsize=9)
    axes.grid(alpha=0.25)
    if series:
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=140)


def draw_runs(done: Sequence[tuple[Run, Mapping[str, Any]]], root: Path, console: Console) -> None:
    """The segment graph of each network, and what its first run of each method removed, as SVG."""
    seen: set[str] = set()
    for run, line in done:
        kind = f"{run.network}{'-parameterless' if run.parameterless else ''}"
        name = kind if run.method == "full" else f"{kind}-{run.method}-{run.sparsity or run.params:g}"
        if name in seen or "refused" in line:
            continue
        seen.add(name)
        if not (root / f"{name}.svg").exists():
            write_text(root / f"{name}.svg", draw_space(_space(run), line.get("removed", ()), name))
    console.print(f"Drawings: {', '.join(f'{name}.svg' for name in sorted(seen))}")


def _space(run: Run) -> SearchSpace:
    data = splits(run)
    channels = data.train.shape[0]
    model = build(run.network, run.width, channels, data.train.classes, data.size)
    example = torch.zeros(2, channels, data.size, data.size)
    return search_space(model, (example,), parameterless=run.parameterless)
