"""Searches and the networks that they find, on real images, one JSON line per pair.

    ESPALIER_DATA=... python -m espalier.nas.proof --out runs/nas [--spaces s2 s4 darts] [--ablation]

Each pair lies in a folder of its own, goes on where it was stopped, and is not run again once it has ended.
``--ablation`` settles what the normalisation of μ does: GS-NAS's default with each normalisation at the same
target, and the published one on images whose labels mean nothing.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from espalier.nas.loop import Folder, Line
from espalier.nas.recipe import SearchRecipe, search_recipe, train_recipe
from espalier.nas.result import Found
from espalier.nas.search import search
from espalier.nas.train import train

WITHOUT_WEIGHTS = ("skip", "noise", "max_pool_3x3", "avg_pool_3x3")


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--spaces", nargs="+", default=["s2", "s4", "darts"])
    parser.add_argument("--methods", nargs="+", default=["gs-nas:paper", "gs-nas", "darts", "random", "h2spg"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scale", default="short")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--only", nargs="+", help="only runs whose label has one of these parts")
    parser.add_argument("--out", type=Path, default=Path("runs/nas"))
    parser.add_argument("--table", type=Path, help="print the lines of this file as tables, and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(tables([json.loads(text) for text in args.table.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    for recipe, label in _ablation(args) if args.ablation else _recipes(args):
        if args.only and not any(part in label for part in args.only):
            continue
        one(recipe, label, args.out, trains=not args.ablation)


def _recipes(args: argparse.Namespace) -> Iterator[tuple[SearchRecipe, str]]:
    for seed in args.seeds:
        for space in args.spaces:
            for entry in args.methods:
                method, _, preset = entry.partition(":")
                changes = {"seed": seed, "device": args.device}
                recipe = search_recipe(space, method, preset or "default", args.scale, **changes)
                yield recipe, recipe.name


def _ablation(args: argparse.Namespace) -> Iterator[tuple[SearchRecipe, str]]:
    """The first steps of both presets, on the images as they are and with labels that mean nothing; then each
    normalisation, with the μ that gives a separable convolution of the normal cells the default's μ_k / |w_k(0)|.
    """
    for seed in args.seeds:
        for space in args.spaces:
            for preset in ("paper", "default"):
                for shuffled in (False, True):
                    recipe = search_recipe(space, "gs-nas", preset, args.scale, seed=seed, device=args.device)
                    groups = replace(recipe.groups, norms_every=1)
                    images = replace(recipe.images, shuffled=shuffled)
                    recipe = replace(recipe, images=images, groups=groups, epochs=0.1, target_params=0.0, threshold=0.0)
                    yield recipe, f"{space}-first-steps-{preset}-{'shuffled' if shuffled else 'real'}-{seed}"
            for normalize, mu in (("div", 31.0), ("none", 0.58), ("mul", 0.0108)):
                recipe = search_recipe(space, scale=args.scale, seed=seed, device=args.device)
                recipe = replace(recipe, groups=replace(recipe.groups, normalize=normalize, mu=mu))
                yield recipe, f"{space}-normalised-{normalize}-{seed}"


def one(recipe: SearchRecipe, label: str, out: Path, trains: bool = True) -> None:
    """Search, train what was found, and write a line."""
    file = out / label / "line.json"
    if not file.exists():
        found = search(recipe, Folder(out / label / "search", _tell))
        trained: dict[str, Any] = {}
        own = train_recipe(recipe.scale, recipe.images.data, recipe.space, seed=recipe.seed, device=recipe.device)
        if trains:
            trained = train(found.genotype, own, Folder(out / label / "train", _tell))
        file.write_text(json.dumps(line_of(recipe, label, found, trained)) + "\n")
        print(file.read_text(), end="", flush=True)
    lines = sorted(out.glob("*/line.json"))
    (out / "results.jsonl").write_text("".join(p.read_text() for p in lines))


def line_of(recipe: SearchRecipe, label: str, found: Found, trained: dict[str, Any]) -> dict[str, Any]:
    """What the table of results holds."""
    operations = found.genotype.operations()
    weightless = sum(name in WITHOUT_WEIGHTS for _, _, name in operations)
    possible = {"darts": (84, 196), "s2": (28, 56), "s4": (28, 56)}.get(recipe.space)
    return {
        "label": label,
        "space": recipe.space,
        "method": recipe.method,
        "preset": recipe.preset,
        "normalize": recipe.groups.normalize,
        "seed": recipe.seed,
        "operations": len(operations),
        "without weights": weightless,
        "of possible": possible,
        "params at target": found.params,
        **{key: round(value, 3) for key, value in found.scores.items()},
        **{f"search {key}": value for key, value in found.cost.items()},
        "derived params": trained.get("params"),
        "test accuracy": trained.get("test accuracy"),
        "train wall_s": trained.get("wall_s"),
        "zero over time": zero_over_time(found),
        "notes": list(found.notes),
        "genotype": found.genotype.to_json()["cells"],
    }


def tables(lines: list[Line]) -> str:
    """Results as Markdown: derived networks, and the ablation."""
    out = ["| space | method | operations | without weights | parameters | supernet | discretised | test accuracy |"]
    out.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows: dict[tuple[str, str], list[Line]] = {}
    for line in (line for line in lines if line["test accuracy"] is not None):
        name = f"{line['method']}, {line['preset']}" if line["method"] == "gs-nas" else line["method"]
        rows.setdefault((line["space"], name), []).append(line)
    for (space, name), seeds in rows.items():
        without, every = seeds[0]["of possible"]
        found = (
            f"{_each(seeds, 'operations')} of {every}",
            f"{_each(seeds, 'without weights')} of {without}",
            _each(seeds, "params at target", ","),
            *(_each(seeds, f"validation accuracy {key}", ".2f") for key in ("of the supernet", "discretised")),
            _each(seeds, "test accuracy", ".2f"),
        )
        out.append(f"| {space} | {name} | " + " | ".join(found) + " |")
    out += ["", "| run | operations | without weights | with weights | [step, without, with weights at zero] |"]
    out.append("| --- | ---: | ---: | ---: | --- |")
    for line in (line for line in lines if line["test accuracy"] is None):
        without, every = line["of possible"]
        changes = line["zero over time"]
        shown = ", ".join(str(row) for row in (changes if len(changes) < 7 else [*changes[:3], "…", *changes[-2:]]))
        kept = line["without weights"]
        out.append(
            f"| {line['label']} | {line['operations']} of {every} | {kept} of {without} "
            f"| {line['operations'] - kept} of {every - without} | {shown} |"
        )
    return "\n".join(out)


def _each(seeds: list[Line], key: str, form: str = "") -> str:
    """The values of all seeds, in their order."""
    return " / ".join(format(line[key], form) for line in seeds if line.get(key) is not None)


def zero_over_time(found: Found) -> list[list[int]]:
    """[step, dead operations without weights, dead operations with weights], where they change."""
    rows: list[list[int]] = []
    for line in found.lines:
        if "dead" in line:
            without = sum(name.split(".")[-1] in WITHOUT_WEIGHTS for name in line["dead"])
            row = [line["step"], without, len(line["dead"]) - without]
            if not rows or rows[-1][1:] != row[1:]:
                rows.append(row)
    return rows


def _tell(line: Line) -> None:
    if "trial" in line or "candidate" in line or line.get("step", 1) % 50 == 0:
        print({k: v for k, v in line.items() if k not in ("norms", "dead")}, flush=True)


if __name__ == "__main__":
    main()
