"""Table 2 of L0-ARM from the logs of ``espalier.experiments.l0``, beside the paper's figures.

python -m espalier.experiments.l0_table docs/results/l0/*.jsonl
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from espalier.experiments.l0_plots import Log, read
from espalier.experiments.spread import spread

# Retained, weights pruned in per cent, accuracy in per cent: medians of five runs.
PAPER = {
    ("mlp", "hc", "one"): "219-214-100, 73.98, 98.6",
    ("mlp", "ar", "one"): "453-150-68, 70.39, 98.3",
    ("mlp", "arm", "one"): "143-153-78, 87.00, 98.3",
    ("mlp", "hc", "separate"): "266-88-33, 89.99, 98.2",
    ("mlp", "ar", "separate"): "464-114-65, 77.10, 98.2",
    ("mlp", "arm", "separate"): "159-74-73, 92.96, 98.1",
    ("lenet5", "hc", "one"): "20-25-45-462, 91.1, 99.1",
    ("lenet5", "ar", "one"): "18-28-46-249, 93.73, 98.8",
    ("lenet5", "arm", "one"): "20-16-32-257, 95.52, 99.1",
    ("lenet5", "hc", "separate"): "9-18-65-25, 98.6, 99.0",
    ("lenet5", "ar", "separate"): "5-12-131-22, 98.90, 98.4",
    ("lenet5", "arm", "separate"): "6-10-39-11, 99.49, 98.7",
}
HEAD = ("method, λ", "seeds", "epochs", "retained", "pruned %", "accuracy %", "MACs, % of full")
MORE = ("gates with 0.05 < π < 0.95, %", "CPU s per epoch", "paper: retained, pruned, accuracy")


def table(logs: dict[str, Log]) -> str:
    """Markdown, a table per network; ``logs`` by name, as in ``mlp-arm-one-0``. What several seeds gave is a mean and a
    deviation; an epoch's CPU seconds are means over all epochs.
    """
    runs: dict[tuple[str, str, str], list[tuple[str, Log]]] = {}
    for name, log in sorted(logs.items()):
        network, method, lam, seed = name.split("-")
        runs.setdefault((network, method, lam), []).append((seed, log))
    parts = []
    for network in dict.fromkeys(key[0] for key in PAPER):
        keys = [key for key in PAPER if key in runs and key[0] == network]
        if keys:
            head = f"| {' | '.join((network, *HEAD[1:], *MORE))} |"
            rows = [_row(key, runs[key]) for key in keys]
            parts.append("\n".join((head, "|" + " --- |" * len(HEAD + MORE), *rows)))
    return "\n\n".join(parts)


def _row(key: tuple[str, str, str], found: list[tuple[str, Log]]) -> str:
    last = [log[-1] for _, log in found]
    cells = [
        f"L0-{key[1].upper()}, {'one λ' if key[2] == 'one' else 'a λ per layer'}",
        ", ".join(seed for seed, _ in found),
        ", ".join(dict.fromkeys(str(line["epoch"]) for line in last)),
        ", ".join(line["open"] for line in last),
        spread(line["prune"] for line in last),
        spread(line["accuracy"] for line in last),
        spread(100.0 * line["macs_share"] for line in last),
        spread((100.0 * line["undecided"] for line in last), 1),
        f"{mean(line['cpu_s'] for _, log in found for line in log):.1f}",
        PAPER[key],
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    args = parser.parse_args(arguments)
    sys.stdout.write(table({path.stem: read(path) for path in args.logs}) + "\n")


if __name__ == "__main__":
    main()
