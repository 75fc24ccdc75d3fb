"""Remove half of the channels and heads of every model of the zoo; write docs/results/zoo_channels.md.

python benchmarks/zoo_channels.py                      # resumes: what runs/zoo_channels.jsonl has is not run again
python benchmarks/zoo_channels.py --only timm/resnet   # names that start so, run again
python benchmarks/zoo_channels.py --again              # run again what failed or was not exact
python benchmarks/zoo_channels.py --table              # only writes the table

Of every family, half of the structures go at random. The sub-network's outputs are compared with the masked
network's, in eval and in train mode, without dropout, in float64 (float32 where a kernel takes no other).
"""

import argparse
import copy
import gc
import json
import random
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from zoo_checks import difference, generic, in_double, tensors, without_dropout
from zoo_models import Example, zoo

import espalier

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "runs" / "zoo_channels.jsonl"
PAGE = ROOT / "docs" / "results" / "zoo_channels.md"
LARGEST = 320e6  # parameters: three copies in float64 have to fit into memory
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def check(make: Callable[[], Example]) -> dict[str, Any]:
    """Half of every family, at random."""
    torch.manual_seed(0)
    model, args, kwargs = make()
    params = sum(p.numel() for p in model.parameters())
    if params > LARGEST:
        return {"skipped": f"{params:,} parameters: too large for this machine in float64"}
    generic(model)
    without_dropout(model)
    try:
        with torch.no_grad():
            copy.deepcopy(model).double().eval()(*in_double(args), **in_double(kwargs))
        model, args, kwargs = model.double(), in_double(args), in_double(kwargs)
    except RuntimeError:
        pass  # a kernel that takes single precision only
    start = time.perf_counter()
    space = espalier.search_space(model, args, kwargs, levels=("channel", "head"))
    record: dict[str, Any] = {
        "params": params,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "space_s": round(time.perf_counter() - start, 2),
        "families": dict(Counter(f.level for f in space.families)),
        "structures": len(space),
        "unknown": dict(Counter(str(node.target) for node in space.axes.unknown if node.op == "call_function")),
    }
    if not len(space):
        return record | {"share": 1.0}
    solution = half_of_every_family(space)
    start = time.perf_counter()
    small = espalier.construct(space, solution)
    record["construct_s"] = round(time.perf_counter() - start, 2)
    masked = space.masked(solution)
    for mode in (False, True):
        record["train" if mode else "eval"] = compared(small, masked, args, kwargs, mode)
    return record | {
        "share": round(sum(p.numel() for p in small.parameters()) / params, 4),
        "own_class": isinstance(small, type(model)),
        "graphs_within": sum(isinstance(m, fx.GraphModule) for m in small.modules()),
    }


def half_of_every_family(space: espalier.SearchSpace, seed: int = 0) -> espalier.Solution:
    """A random half (rounded down) of each family goes."""
    rng = random.Random(seed)
    removed = [f.name_of(i) for f in space.families for i in rng.sample(range(len(f)), len(f) // 2)]
    return space.solution(removed, {"method": "half of every family at random"})


def compared(a: nn.Module, b: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> float:
    """The largest difference of the outputs under one seed, relative to the largest output above one."""
    results = []
    for module in (a, b):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(tensors(copy.deepcopy(module).train(training)(*args, **kwargs)))
    pairs = list(zip(*results, strict=False))
    scale = max((float(y.abs().max()) for _, y in pairs if y.is_floating_point() and y.numel()), default=1.0)
    return max((difference(x, y) for x, y in pairs), default=float("inf")) / max(scale, 1.0)


def verdict(record: dict[str, Any]) -> str:
    """'' if the model passed, else what is wrong in a few words."""
    if "failure" in record:
        return record["failure"].splitlines()[0][:160]
    if "skipped" in record:
        return record["skipped"]
    if record["share"] == 1.0:
        return "nothing can be narrowed"
    worst = max(record["eval"], record["train"])
    return "" if worst <= TOLERANCE[record["dtype"]] else f"differs by {worst:.1e}"


def run(name: str, make: Callable[[], Example], limit: int) -> dict[str, Any]:
    """The record of one check; a failure or a timeout is a record too."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"over {limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    record: dict[str, Any] = {"name": name}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record |= check(make)
    except Exception as error:
        record |= {"failure": f"{type(error).__name__}: {error}"[:400], "traceback": traceback.format_exc()[-1500:]}
    finally:
        signal.alarm(0)
    return record


def records() -> dict[str, dict[str, Any]]:
    """The last record of each model."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def write(done: dict[str, dict[str, Any]], names: list[str]) -> None:
    """The page: a count per library, then a row per model."""
    rows = [done[name] for name in names if name in done]
    counts = []
    for library in ("transformers", "torchvision", "timm"):
        own = [r for r in rows if r["name"].startswith(library) and "skipped" not in r]
        exact = [r for r in own if not verdict(r)]
        kept = [r for r in exact if r["own_class"]]
        counts.append(f"| {library} | {len(own)} | {len(exact)} | {len(kept)} |")
    lines = [
        "# Half of the channels and heads of public models",
        "",
        "Of every family a random half of the structures is removed; the sub-network's outputs are compared with the",
        "masked network's in eval and in train mode, without dropout. Weights are random, scales, shifts and running",
        "averages too, so that a zero cannot hide a mistake. Exact: the largest difference is at most 1e-9 of the",
        "largest output in float64 (1e-4 in float32, where a kernel of the model takes no float64).",
        "",
        "    python benchmarks/zoo_channels.py",
        "",
        "2-core x86 CPU, torch 2.13, 2026-11-21; other work ran beside it, so the seconds are upper bounds.",
        "",
        f"{len(rows)} of the zoo's {len(names)} models have been run; the command goes on where it was.",
        "",
        "Two networks cannot be narrowed: all convolutions of nf_resnet26 and resnetv2_50x1_bit standardise their",
        "weights (`batch_norm` over a filter's weights), so that a filter depends on all its inputs, which therefore",
        "stay. Three are too large for the memory of this machine, three copies in float64.",
        "",
        "| library | models | exact | in the model's own class |",
        "| --- | --- | --- | --- |",
        *counts,
        "",
        "*Parameters*: what is left of them. *Class*: `own` is the model's own class, with the number of its blocks",
        "that had to be replaced by graphs behind it; `graph` is an `fx.GraphModule` over the model's layers.",
        "*Kept*: functional operators without a rule, whose axes stay whole.",
        "",
        "| model | parameters | families | space, s | construct, s | eval | train | class | kept |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        bad = verdict(r)
        if "share" not in r:
            lines.append(f"| {r['name']} | {bad} | | | | | | | |")
            continue
        families = ", ".join(f"{n} {level}" for level, n in r["families"].items()) or "none"
        kind = "" if "own_class" not in r else "own" if r["own_class"] else "graph"
        kind += f" + {r['graphs_within']}" if kind == "own" and r["graphs_within"] else ""
        kept = ", ".join(f"{t.removeprefix('aten.')} × {n}" for t, n in r["unknown"].items())
        gaps = [f"{r[mode]:.0e}" if mode in r else "" for mode in ("eval", "train")]
        mark = f" **{bad}**" if bad else ""
        lines.append(
            f"| {r['name']}{mark} | {r['share']:.3f} | {families} | {r['space_s']} | {r.get('construct_s', '')} | "
            f"{gaps[0]} | {gaps[1]} | {kind} | {kept} |"
        )
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="run the models again whose names start so")
    parser.add_argument("--again", action="store_true", help="run again what failed or was not exact")
    parser.add_argument("--table", action="store_true", help="write the table from the records and stop")
    parser.add_argument("--limit", type=int, default=180, help="seconds for one model")
    options = parser.parse_args()
    RECORDS.parent.mkdir(exist_ok=True)
    models, done = zoo(), records()
    for name, make in () if options.table else models.items():
        wanted = any(name.startswith(start) for start in options.only)
        known = done.get(name)
        if not wanted and (options.only or (known is not None and not (options.again and verdict(known)))):
            continue
        record = run(name, make, options.limit)
        gc.collect()
        with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name}: {verdict(record) or 'exact'}", flush=True)
    write(records(), list(models))


if __name__ == "__main__":
    main()
