"""What half of the MACs is worth in milliseconds: eager and compiled, with and without aligned widths.

    python benchmarks/latency.py            # resumes; one process per model
    python benchmarks/latency.py --table    # only writes docs/results/latency.md

For each model: the full network, half of its MACs, half of its MACs with ``round_to=8``, and half of its latency, all
by ``espalier.prune`` with its defaults. The variants are run in turns, so that the machine's other load falls on
all of them alike; the figures are medians. ``torch.compile`` compiles with its defaults. A latency budget is met where
it is measured, in turns with the full network alone: in turns with four others a network may take a little longer.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo_example import import_torchvision

import espalier
from espalier import Budget
from espalier.errors import BudgetError
from espalier.space.cost import count_macs
from espalier.space.latency import latency

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "runs" / "latency.jsonl"
PAGE = ROOT / "docs" / "results" / "latency.md"
VARIANTS = {
    "macs": Budget(macs=0.5),
    "macs, round_to=8": Budget(macs=0.5, round_to=8),
    "latency": Budget(latency=0.5),
    "latency, round_to=8": Budget(latency=0.5, round_to=8),
}
MODELS = ("resnet50", "mobilenet_v2", "vit_b_16", "llama")


def load(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Random weights; one image of 224 × 224, or 256 tokens."""
    torch.manual_seed(0)
    if name != "llama":
        return getattr(import_torchvision().models, name)(weights=None).eval(), torch.randn(1, 3, 224, 224)
    import_torchvision()  # transformers imports it by itself, and may not find its operators
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), torch.randint(0, 8000, (1, 256))


def in_turns(networks: dict[str, nn.Module], x: torch.Tensor, rounds: int = 25) -> dict[str, float]:
    """The median time of each, in milliseconds; the first rounds warm up (and compile)."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        for i in range(rounds + 3):
            for name, network in networks.items():
                start = time.perf_counter()
                network(x)
                if i >= 3:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def one(name: str) -> None:
    """Print the record of one model as the last line."""
    model, x = load(name)
    networks: dict[str, nn.Module] = {"full": model}
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    for label, budget in VARIANTS.items():
        start = time.perf_counter()
        try:
            networks[label] = espalier.prune(model, x, budget=budget)
        except BudgetError as error:
            failures[label] = str(error)
        seconds[label] = time.perf_counter() - start
    macs = {label: count_macs(network, (x,)) for label, network in networks.items()}
    eager = in_turns(networks, x)
    compiled = in_turns({label: torch.compile(network) for label, network in networks.items()}, x)  # type: ignore[misc]
    record: dict[str, Any] = {
        "model": name, "macs": macs, "eager_ms": eager, "compiled_ms": compiled, "prune_s": seconds,
        "failures": failures, "threads": torch.get_num_threads(), "alone_ms": 1e3 * latency(model, (x,)),
    }  # fmt: skip
    print(json.dumps(record))


def write() -> None:
    """The page."""
    lines = [
        "# Half of the MACs in milliseconds",
        "",
        *(__doc__ or "").split("\n")[2:],
        "2-core x86 CPU, one thread (OMP_NUM_THREADS=1);",
        f"torch {torch.__version__.split('+')[0]}, float32, batch of 1, 2026-11-21; other work ran",
        "beside it. In brackets: the share of the full network's.",
        "",
        "| model | variant | MACs | eager, ms | compiled, ms | prune, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in map(json.loads, RECORDS.read_text().splitlines()):
        for label in ("full", *VARIANTS):
            if label in record["failures"]:
                lines.append(f"| {record['model']} | {label} | {record['failures'][label]} | | | |")
                continue
            cells = [f"{record['macs'][label] / 1e9:.2f} G ({record['macs'][label] / record['macs']['full']:.2f})"]
            for kind in ("eager_ms", "compiled_ms"):
                cells.append(f"{record[kind][label]:.1f} ({record[kind][label] / record[kind]['full']:.2f})")
            cells.append(f"{record['prune_s'][label]:.1f}" if label != "full" else "")
            lines.append(f"| {record['model']} | {label} | " + " | ".join(cells) + " |")
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", metavar="MODEL")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    RECORDS.parent.mkdir(exist_ok=True)
    done = [json.loads(line)["model"] for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    for name in () if options.table else [m for m in MODELS if m not in done]:
        command = [sys.executable, "-W", "ignore", __file__, "--one", name]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        with RECORDS.open("a") as file:
            file.write(ended.stdout.splitlines()[-1] + "\n")
        print(name, "done", flush=True)
    write()


if __name__ == "__main__":
    main()
