"""Figures 2 and 3 of L0-ARM from the logs of ``espalier.experiments.l0``.

    python -m espalier.experiments.l0_plots docs/results/l0/{lenet5-*-one-0,mlp-*-one-1}.jsonl \\
        --out docs/pictures/l0.png --histograms docs/pictures/l0_histograms.png

``--out`` (Figure 3), a row per network: prune rate, expected MACs in training (two passes for ARM) and MACs of the
constructed network, by epoch. ``--histograms`` (Figure 2), a panel per log that holds them from the first epoch to the
last: how the probabilities of the gates move. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Log = list[dict[str, Any]]
PANELS = {
    "prune": "weights pruned, %",
    "expected_share": "expected MACs in training, share",
    "macs_share": "MACs of the constructed network, share",
}


def read(path: Path) -> Log:
    """The lines of a log, one per epoch."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def draw_curves(logs: dict[str, Log], out: Path) -> None:
    """Write Figure 3; ``logs`` by name, as in ``mlp-arm-one-0``."""
    networks = _networks(logs)
    figure = _figure(4.0 * len(PANELS), 3.0 * len(networks))
    grid = figure.subplots(len(networks), len(PANELS), squeeze=False)
    for network, row in zip(networks, grid, strict=True):
        own = {name: log for name, log in logs.items() if name.startswith(f"{network}-")}
        for axes, (key, title) in zip(row, PANELS.items(), strict=True):
            for name, log in own.items():
                axes.plot([line["epoch"] for line in log], [line[key] for line in log], label=name)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("epoch")
            axes.set_ylim(bottom=0)
        row[0].legend(fontsize=8)
    _save(figure, out)


def draw_histograms(logs: dict[str, Log], out: Path) -> None:
    """Write Figure 2; logs without the histogram of every epoch are left out. ValueError if none has it."""
    whole = {name: log for name, log in logs.items() if all("pi" in line for line in log)}
    if not whole:
        raise ValueError(f"none of {', '.join(logs)} holds the probabilities' histogram ('pi') in all of its lines")
    rows = [[name for name in whole if name.startswith(f"{network}-")] for network in _networks(whole)]
    columns = max(map(len, rows))
    figure = _figure(3.4 * columns + 0.6, 2.8 * len(rows))
    grid, picture = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True), None
    for row, names in zip(grid, rows, strict=True):
        for axes, name in zip(row, names, strict=False):
            shares = [[n / sum(line["pi"]) for n in line["pi"]] for line in whole[name]]
            extent, turned = (0, len(shares), 0, 1), list(zip(*shares, strict=True))
            picture = axes.imshow(turned, "magma_r", origin="lower", aspect="auto", extent=extent, vmin=0, vmax=0.3)
            axes.set_title(name, fontsize=9)
        row[0].set_ylabel("probability to be open")
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    figure.colorbar(picture, ax=grid.ravel().tolist(), label="share of the gates (0.3 and more)", extend="max")
    _save(figure, out)


def _networks(logs: dict[str, Log]) -> list[str]:
    return list(dict.fromkeys(name.split("-")[0] for name in logs))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/l0.png"))
    parser.add_argument("--histograms", type=Path)
    args = parser.parse_args(arguments)
    logs = {path.stem: read(path) for path in args.logs}
    draw_curves(logs, args.out)
    if args.histograms:
        draw_histograms(logs, args.histograms)


if __name__ == "__main__":
    main()
