"""Figures 2 and 3 of L0-ARM from the logs of ``espalier.experiments.l0``.

    python -m espalier.experiments.l0_plots docs/results/l0/*.jsonl --out docs/pictures/l0.png

Prune rate, expected MACs in training (two passes for ARM) and MACs of the constructed network, by epoch; and, of logs
that hold it, the histogram of the gates' probabilities at the start and at the end. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Log = list[dict[str, Any]]


def read(path: Path) -> Log:
    """The lines of a log, one per epoch."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def draw(logs: dict[str, Log], out: Path) -> None:
    """Write the picture; ``logs`` by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {name: f"C{i % 10}" for i, name in enumerate(logs)}
    spread = {name: log for name, log in logs.items() if "pi" in log[-1]}
    figure, axes = pyplot.subplots(1, 3 + bool(spread), figsize=(4.2 * (3 + bool(spread)), 3.4))
    panels = (("prune", "weights pruned, %"), ("expected_share", "expected MACs in training, share"),
              ("macs_share", "MACs of the constructed network, share"))  # fmt: skip
    for axis, (key, title) in zip(axes, panels, strict=False):
        for name, log in logs.items():
            axis.plot([line["epoch"] for line in log], [line[key] for line in log], colours[name], label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("epoch")
    axes[0].legend(fontsize=7)
    if spread:
        for name, log in spread.items():
            first = next(line for line in log if "pi" in line)
            for line, style in ((first, ":"), (log[-1], "-")):
                total, count = sum(line["pi"]), len(line["pi"])
                middles = [(i + 0.5) / count for i in range(count)]
                shares, label = [n / total for n in line["pi"]], f"{name}, epoch {line['epoch']}"
                axes[3].plot(middles, shares, style, color=colours[name], label=label)
        axes[3].set_title("share of gates by probability", fontsize=9)
        axes[3].legend(fontsize=7)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/l0.png"))
    args = parser.parse_args(arguments)
    draw({path.stem: read(path) for path in args.logs}, args.out)


if __name__ == "__main__":
    main()
