"""espalier beside Torch-Pruning and only_train_once: half of the channels of 25 torchvision models.

    pip install torch-pruning only_train_once     # the peers; not dependencies of espalier
    python benchmarks/peers.py                    # every (model, library) in a process of its own; resumes
    python benchmarks/peers.py --table            # only writes docs/results/peers.md

For each: whether it works, how far the pruned network is from the full one with the same channels at zero, the time
to build the search space (dependency graph) and to prune, and the parameters that are left. Times are those of the
second of two runs in one process, in float32; ours are then compared in float64, untimed.
"""

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo_checks import generic, without_dropout
from zoo_example import import_torchvision

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "runs" / "peers.jsonl"
PAGE = ROOT / "docs" / "results" / "peers.md"
LIMIT = 120  # seconds
LIBRARIES = ("espalier", "torch_pruning", "only_train_once")
MODELS = (
    "resnet18", "resnet50", "wide_resnet50_2", "squeezenet1_1", "alexnet", "vgg16_bn", "densenet121", "mobilenet_v2",
    "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "fcn_resnet50", "deeplabv3_resnet50",
    "lraspp_mobilenet_v3_large", "googlenet", "inception_v3", "regnet_x_800mf", "regnet_y_400mf", "resnext50_32x4d",
    "convnext_tiny", "shufflenet_v2_x1_0", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t",
)  # fmt: skip


def load(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model with random weights, scales and running averages, in eval mode."""
    torchvision = import_torchvision()
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None}
    if name.startswith(("fcn", "deeplab", "lraspp")):
        options["weights_backbone"] = None
        makers = torchvision.models.segmentation
    else:
        makers = torchvision.models
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    model = getattr(makers, name)(**options).eval()
    generic(model)
    without_dropout(model)
    sizes = {"inception_v3": 299, "vit_b_16": 224, "swin_t": 224, "swin_v2_t": 256, "maxvit_t": 224}
    side = sizes.get(name, 224)
    return model, torch.randn(2, 3, side, side)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def first(output: Any) -> torch.Tensor:
    return output["out"] if isinstance(output, dict) else output


def with_espalier(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """A random half of every family of channels and heads."""
    import espalier

    def prune(model: nn.Module, x: torch.Tensor) -> tuple[Any, Any, nn.Module, float, float]:
        clock = time.perf_counter()
        space = espalier.search_space(model, x, levels=("channel", "head"))
        built = time.perf_counter() - clock
        rng = random.Random(0)
        removed = [f.name_of(i) for f in space.families for i in rng.sample(range(len(f)), len(f) // 2)]
        clock = time.perf_counter()
        solution = space.solution(removed)
        small = espalier.construct(space, solution)
        return space, solution, small, built, time.perf_counter() - clock

    prune(model, x)
    *_, built, pruned = prune(model, x)
    model, x = model.double(), x.double()
    space, solution, small, *_ = prune(model, x)
    with torch.no_grad():
        gap = (first(small(x)) - first(space.masked(solution)(x))).abs().max()
    return {"build_s": built, "prune_s": pruned, "difference": float(gap), "left": count(small) / count(model)}


def with_torch_pruning(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Its magnitude pruner at half of the channels; the masked network has the same channels at zero."""
    _torch_pruning(copy.deepcopy(model), x)
    return _torch_pruning(model, x)


def _torch_pruning(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    import torch_pruning as tp

    full, before = copy.deepcopy(model), count(model)
    names = {module: name for name, module in model.named_modules()}
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    outputs = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    if hasattr(model, "classifier") and not outputs:
        outputs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels in (21, 1000)]
    clock = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=outputs or [last]
    )
    built = time.perf_counter() - clock
    clock = time.perf_counter()
    gone: list[tuple[str, list[int]]] = []
    for group in pruner.step(interactive=True):
        taken: dict[str, set[int]] = {}
        for dep, idxs in group:
            module = dep.target.module
            if module in names and group._DG.is_out_channel_pruning_fn(dep.handler):
                taken.setdefault(names[module], set()).update(int(i) for i in idxs)
        gone += [(name, sorted(idxs)) for name, idxs in taken.items()]
        group.prune()
    pruned = time.perf_counter() - clock
    with torch.no_grad():
        left: dict[str, list[int]] = {}  # indices are those of the layer as it was when its group went
        for name, positions in gone:
            layer = full.get_submodule(name)
            if not isinstance(getattr(layer, "weight", None), nn.Parameter):
                continue
            alive = left.setdefault(name, list(range(len(layer.weight))))
            idxs = [alive[i] for i in positions]
            left[name] = [i for i in alive if i not in set(idxs)]
            for parameter in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
                if isinstance(parameter, nn.Parameter):
                    parameter[idxs] = 0
        gap = None if _averages(full) else float((first(model(x)) - first(full(x))).abs().max())
        first(model(x))
    return {"build_s": built, "prune_s": pruned, "difference": gap, "left": count(model) / before}


def _averages(model: nn.Module) -> bool:
    """A norm over channels: with channels at zero it averages over zeros, and is no measure of what was cut."""
    return any(isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for m in model.modules())


def with_only_train_once(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Its random compression of half of the groups."""
    from only_train_once import OTO

    before = count(model)
    clock = time.perf_counter()
    oto = OTO(model=model, dummy_input=x)
    built = time.perf_counter() - clock
    clock = time.perf_counter()
    oto.random_set_zero_groups(target_group_sparsity=0.5)
    with torch.no_grad():
        expected = first(model(x))
    folder = ROOT / "runs" / "only_train_once"
    oto.construct_subnet(out_dir=str(folder))
    pruned = time.perf_counter() - clock
    small = torch.load(oto.compressed_model_path, weights_only=False)
    with torch.no_grad():
        gap = (first(small(x)) - expected).abs().max()
    return {"build_s": built, "prune_s": pruned, "difference": float(gap), "left": count(small) / before}


def one(name: str, library: str) -> None:
    """Print the record of one (model, library) as the last line."""
    model, x = load(name)
    print(json.dumps({"with": library, **globals()[f"with_{library}"](model, x)}))


def run(name: str, library: str) -> dict[str, Any]:
    """The same in a process of its own, with a limit."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, library]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"failure": f"over {LIMIT} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["(no message)"]
        return {"failure": lines[-1][:150]}
    return json.loads(done.stdout.splitlines()[-1])


def records() -> dict[tuple[str, str], dict[str, Any]]:
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {(r["model"], r["library"]): r for r in map(json.loads, lines)}


def works(record: dict[str, Any], library: str) -> bool:
    """Smaller, and equal to the masked network (to 1e-9 in float64, 1e-3 in the peers' float32) where there is one."""
    if "failure" in record or record["left"] >= 0.95:
        return False
    if record["difference"] is None:
        return True
    return record["difference"] <= (1e-9 if library == "espalier" else 1e-3)


def cell(record: dict[str, Any], library: str) -> str:
    if "failure" in record:
        return f"fails: {record['failure']}".replace("|", "/")
    gap = "no twin" if record["difference"] is None else f"{record['difference']:.0e}"
    text = f"{record['build_s']:.1f} + {record['prune_s']:.1f} s, {record['left']:.3f}, {gap}"
    return text if works(record, library) else f"**{text}**"


def slower(found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """How our times compare where Torch-Pruning works."""
    pairs = [(found[n, "espalier"], found[n, "torch_pruning"]) for n in MODELS if (n, "torch_pruning") in found]
    ratios = [
        (ours["build_s"] + ours["prune_s"]) / (theirs["build_s"] + theirs["prune_s"])
        for ours, theirs in pairs
        if "failure" not in theirs
    ]
    return [
        f"Where Torch-Pruning works, espalier takes {statistics.median(ratios):.1f} times as long in the median "
        f"({min(ratios):.1f} to {max(ratios):.1f}):",
        "nearly all of it is `torch.export` of the model (twice, where eval and train mode differ in more than its",
        "layers), which is what lets it take the models that fail there.",
    ]


def write() -> None:
    found = records()
    lines = [
        "# Beside the peers",
        "",
        *(__doc__ or "").split("\n")[2:],
        "2-core x86 CPU, one thread (OMP_NUM_THREADS=1);",
        "torch 2.13, Torch-Pruning 1.6.1, only_train_once 3.0.1, 2026-11-21; other work ran beside it.",
        f"Limit: {LIMIT} s. Cells: time to build + to prune, parameters left, difference from the masked network. In",
        "bold: not smaller, or not equal. Torch-Pruning removes the channels of least magnitude, the others'",
        "are random. Ours includes the check that the model's own class does the same as the graph. A network with",
        "layer norms has no masked twin for the peers, whose norms would average over the zeros (ours average over",
        "what stays): there, running and being smaller is enough.",
        "",
        *slower(found),
        "",
        "| model | " + " | ".join(LIBRARIES) + " |",
        "| --- | --- | --- | --- |",
    ]
    for name in MODELS:
        row = [cell(found[name, lib], lib) if (name, lib) in found else "" for lib in LIBRARIES]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    totals = [sum(works(found[n, lib], lib) for n in MODELS if (n, lib) in found) for lib in LIBRARIES]
    lines.append("| **works** | " + " | ".join(f"**{n} of {len(MODELS)}**" for n in totals) + " |")
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "LIBRARY"))
    parser.add_argument("--again", nargs="*", default=[], help="models to run again")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.one:
        one(*options.one)
        return
    RECORDS.parent.mkdir(exist_ok=True)
    done = records()
    for name in () if options.table else MODELS:
        for library in LIBRARIES:
            if (name, library) in done and name not in options.again:
                continue
            record = {"model": name, "library": library, **run(name, library)}
            with RECORDS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(name, cell(record, library), flush=True)
    write()


if __name__ == "__main__":
    main()
