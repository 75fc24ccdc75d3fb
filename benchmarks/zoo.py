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
from zoo_checks import constructed, generic, in_double, random_removal, round_trip, without_dropout
from zoo_models import Example, zoo
from zoo_table import write

import espalier
from espalier.graph.trace import trace

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "runs" / "zoo.jsonl"
LARGEST_IN_FLOAT64 = 90e6  # parameters: three copies in float64 have to fit into memory


def check_trace(make: Callable[[], Example]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, args, kwargs = make()
    start = time.perf_counter()
    traced = trace(model, args, kwargs)
    seconds = time.perf_counter() - start
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 2),
        "eval": round_trip(traced, training=False),
        "train": round_trip(traced, training=True),
        "notes": list(traced.notes),
    }


def check_construct(make: Callable[[], Example]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, args, kwargs = make()
    if sum(p.numel() for p in model.parameters()) > LARGEST_IN_FLOAT64:
        return {"skipped": "too large for three copies in float64"}
    model = generic(without_dropout(model.double()))
    dtype = "float64"
    try:
        with torch.no_grad():
            copy.deepcopy(model)(*in_double(args), **in_double(kwargs))
        args, kwargs = in_double(args), in_double(kwargs)
    except RuntimeError:  # kernels that take single precision only
        model, dtype = model.float(), "float32"
    space = espalier.search_space(model, args, kwargs)
    record: dict[str, Any] = {"structures": len(space), "segments": len(space.graph), "dtype": dtype}
    if len(space):
        solution = random_removal(space, seed=0)
        differences = constructed(space, solution)
        record |= {"removed": len(solution.removed), "eval": differences[False], "train": differences[True]}
    return record


STAGES = {"trace": check_trace, "construct": check_construct}


def run(name: str, stage: str, make: Callable[[], Example], limit: int) -> dict[str, Any]:
    """The record of one check; a failure or a timeout is a record too."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"over {limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    record: dict[str, Any] = {"name": name, "stage": stage}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record |= STAGES[stage](make)
    except Exception as error:
        signal.alarm(0)
        record |= {"failure": f"{type(error).__name__}: {error}"[:600], "traceback": traceback.format_exc()[-1500:]}
    finally:
        signal.alarm(0)
    return record | {"took": round(time.perf_counter() - start, 1)}


def records() -> dict[tuple[str, str], dict[str, Any]]:
    """The last record of each (name, stage)."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    parsed = [json.loads(line) for line in lines]
    return {(r["name"], r["stage"]): r for r in parsed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="run the models again whose names start so")
    parser.add_argument("--stage", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--again", action="store_true", help="run again what failed or was not exact")
    parser.add_argument("--table", action="store_true", help="write the table from the records and stop")
    parser.add_argument("--limit", type=int, default=300, help="seconds for one check")
    options = parser.parse_args()
    RECORDS.parent.mkdir(exist_ok=True)
    models = zoo()
    done = records()
    for stage in options.stage if not options.table else ():
        for name, make in models.items():
            wanted = any(name.startswith(start) for start in options.only)
            known = done.get((name, stage))
            if options.only and not wanted:
                continue
            if known is not None and not wanted and not (options.again and is_bad(known)):
                continue
            record = run(name, stage, make, options.limit)
            gc.collect()
            with RECORDS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps({k: v for k, v in record.items() if k != "traceback"}), flush=True)
    write(ROOT / "docs" / "results" / "zoo.md", list(models), records())


def is_bad(record: dict[str, Any]) -> bool:
    """Whether a record is of a failure or of an inexact result."""
    bound = 0.0 if record["stage"] == "trace" else 1e-8
    return "failure" in record or not all(record.get(mode, 0.0) <= bound for mode in ("eval", "train"))


if __name__ == "__main__":
    main()
