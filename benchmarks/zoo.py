"""Trace every model of the zoo, check it, and write docs/results/zoo.md.

python benchmarks/zoo.py                      # resumes: models that runs/zoo.jsonl has are not run again
python benchmarks/zoo.py --only timm/resnet   # names that start so, run again
python benchmarks/zoo.py --table              # only writes the table
"""

import argparse
import copy
import gc
import json
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo_checks import constructed, generic, in_double, random_removal, round_trip, without_dropout
from zoo_models import Example, zoo
from zoo_table import verdict, write

import espalier

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "runs" / "zoo.jsonl"
LARGEST_IN_FLOAT64 = 90e6  # parameters: three copies in float64 have to fit into memory


def check(make: Callable[[], Example]) -> dict[str, Any]:
    """Round trip in both modes, then one random removal, built and compared with the masked network."""
    torch.manual_seed(0)
    model, args, kwargs = make()
    params = sum(p.numel() for p in model.parameters())
    large = params > LARGEST_IN_FLOAT64
    generic(model)
    if not large and _works_in_double(model, args, kwargs):
        model, args, kwargs = model.double(), in_double(args), in_double(kwargs)
    start = time.perf_counter()
    space = espalier.search_space(model, args, kwargs)
    record: dict[str, Any] = {
        "params": params,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - start, 2),
        "eval": round_trip(space.trace, training=False),
        "train": round_trip(space.trace, training=True),
        "notes": list(space.trace.notes),
        "structures": len(space),
        "segments": len(space.graph),
    }
    if large or not (len(space) or record["train"]):
        return record
    dropped = without_dropout(model) | without_dropout(space.trace.graph_module)
    # What functional calls would drop is baked into the trace.
    if dropped and any(node.target == "training" for node in space.trace.graph.nodes):
        space = espalier.search_space(model, args, kwargs)
    if record["train"]:
        record["train_without_dropout"] = round_trip(space.trace, training=True)
    if not len(space):
        return record
    solution = random_removal(space, seed=0)
    differences = constructed(space, solution)
    return record | {
        "removed": len(solution.removed),
        "small_eval": differences[False],
        "small_train": differences[True],
    }


def _works_in_double(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """False for kernels that take single precision only."""
    try:
        with torch.no_grad():
            copy.deepcopy(model).double().eval()(*in_double(args), **in_double(kwargs))
    except RuntimeError:
        return False
    return True


def run(name: str, make: Callable[[], Example], limit: int) -> dict[str, Any]:
    """The record of one check; a failure or a timeout is a record too."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"over {limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    record: dict[str, Any] = {"name": name}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record |= check(make)
    except Exception as error:
        signal.alarm(0)
        record |= {
            "failure": f"{type(error).__name__}: {error}"[:600],
            "traceback": traceback.format_exc()[-1500:],
        }
    finally:
        signal.alarm(0)
    return record | {"took": round(time.perf_counter() - start, 1)}


def records() -> dict[str, dict[str, Any]]:
    """The last record of each model."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="run the models again whose names start so")
    parser.add_argument("--again", action="store_true", help="run again what failed or was not exact")
    parser.add_argument("--table", action="store_true", help="write the table from the records and stop")
    parser.add_argument("--limit", type=int, default=240, help="seconds for one model")
    options = parser.parse_args()
    RECORDS.parent.mkdir(exist_ok=True)
    models = zoo()
    done = records()
    for name, make in () if options.table else models.items():
        wanted = any(name.startswith(start) for start in options.only)
        known = done.get(name)
        if not wanted and (options.only or (known is not None and not (options.again and verdict(known)))):
            continue
        record = run(name, make, options.limit)
        gc.collect()
        with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name}: {verdict(record) or 'exact'} ({record['took']} s)", flush=True)
    write(ROOT / "docs" / "results" / "zoo.md", list(models), records())


if __name__ == "__main__":
    main()
