"""GS-NAS: group sparsity over the operations of a supernet; μ given, or found by bisection."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from espalier.data import Batches
from espalier.errors import SpaceError
from espalier.export import save
from espalier.nas.genotype import Genotype
from espalier.nas.group_search import GroupSearch, Limit
from espalier.nas.loop import Folder, advance, own_device, rank, world
from espalier.nas.recipe import SearchRecipe
from espalier.nas.result import Found
from espalier.nas.score import recalibrate, score
from espalier.nas.space import CellSpace
from espalier.nas.spaces import space
from espalier.nas.supernet import alive_groups, cell_key, genotype_of, take_out, zero_out
from espalier.sparsify.bisect import Bisection, Trial, bisect_mu


def gs_nas(recipe: SearchRecipe, folder: Folder) -> Found:
    """Search with ProxSGD over the groups of operations.

    With ``target_params``, μ is bisected until the derived network is within the target; each later training
    starts from the weights of the nearest one with a smaller μ. Raises :class:`SpaceError` where the best
    training leaves a cell without a path.
    """
    within, device = space(recipe.space), own_device(recipe.device)
    start, notes = time.perf_counter(), []
    if recipe.target_params:
        bisection = _bisect(recipe, within, folder, device)
        best = _nearest(bisection, recipe.target_params / full_params(within, recipe))
        mu, state = best.mu, best.state
        costs = [t.state["steps"] for t in bisection.trials]
        if not bisection.met:
            notes.append(f"the target was not met to within {recipe.tolerance:g}: the nearest trial was taken.")
    else:
        mu = recipe.groups.mu
        state = _trial(recipe, mu, None, folder.below("trial-00"), device)
        costs = [state["steps"]]
    found = conclude(recipe, within, state, device, folder)
    cost = {"steps": sum(costs), "images": sum(costs) * recipe.batch_size, "trials": len(costs)}
    seconds = sum(float(s) for s in state["seconds"])
    cost |= {"mu": mu, "seconds": round(seconds, 1), "wall_s": round(time.perf_counter() - start, 1)}
    return Found(found.genotype, found.params, found.scores, cost, state["lines"], [*notes, *state["notes"]])


def full_params(within: CellSpace, recipe: SearchRecipe) -> int:
    """Parameters of the derived network if everything stayed."""
    cells = {k: {e: [n for n in names if n != "none"] for e, names in within.edges(k).items()} for k in within.kinds}
    return Genotype.of(within, cells).params(recipe.target_channels, recipe.target_cells)


def _bisect(recipe: SearchRecipe, within: CellSpace, folder: Folder, device: torch.device) -> Bisection[Any]:
    full, count, seconds = full_params(within, recipe), 0, []
    if recipe.target_params >= full:
        raise SpaceError(
            f"target_params={recipe.target_params:g}: everything together has {full:,} parameters at "
            f"{recipe.target_cells} cells and {recipe.target_channels} channels; ask for fewer."
        )

    def train(mu: float, state: Mapping[str, Any] | None) -> tuple[float, Mapping[str, Any]]:
        nonlocal count
        part = folder.below(f"trial-{count:02d}")
        count += 1
        folder.tell({"trial": count, "mu": float(f"{mu:.4g}"), "from": "a smaller mu" if state else "scratch"})
        ended = _trial(recipe, mu, state, part, device)
        seconds.append(ended["seconds"][-1])
        ended = {**ended, "seconds": list(seconds)}
        try:
            params = genotype_of(within, ended["alive"]).params(recipe.target_channels, recipe.target_cells)
        except SpaceError:
            params = 0  # nothing works any more: far too much was removed
        folder.tell({"trial": count, "mu": float(f"{mu:.4g}"), "groups": len(ended["alive"]), "params": params})
        return params / full, ended

    target = recipe.target_params / full
    return bisect_mu(
        train, target, recipe.groups.mu, tolerance=min(recipe.tolerance, target), max_trials=recipe.trials, factor=2.0
    )


def _nearest(bisection: Bisection[Any], target: float) -> Trial[Any]:
    """The best trial whose cells work: the largest within the target, else the smallest."""
    working = [t for t in bisection.trials if t.share > 0.0]
    if not working:
        raise SpaceError(
            "every trial removed all paths of a cell: lower mu (now "
            f"{', '.join(f'{t.mu:.3g}' for t in bisection.trials)}), or allow more trials."
        )
    within = [t for t in working if t.share <= target]
    return max(within, key=lambda t: t.share) if within else min(working, key=lambda t: t.share)


def new_supernet(recipe: SearchRecipe, within: CellSpace, device: torch.device, scalars: bool = True) -> nn.Module:
    """The supernet of a recipe, from its seed."""
    data = recipe.images.load("train")
    torch.manual_seed(recipe.seed)
    return within.supernet(recipe.channels, recipe.cells, data.classes, data.shape[0], scalars).to(device)


def new_batches(recipe: SearchRecipe, device: torch.device) -> Batches:
    """The training images of a recipe."""
    data = recipe.images.load("train")
    augment = recipe.images.augment(data.shape[1])
    return Batches(
        data, recipe.batch_size, recipe.seed, augment, drop_last=True, device=device, rank=rank(), world=world()
    )


def _trial(
    recipe: SearchRecipe, mu: float, start: Mapping[str, Any] | None, folder: Folder, device: torch.device
) -> dict[str, Any]:
    """One training at one μ: the end state with what stays, from the disk if it is there."""
    done = folder.load("end.pt")
    if done is not None:
        return done
    batches = new_batches(recipe, device)
    within = space(recipe.space)
    model = new_supernet(recipe, within, device)
    steps = max(1, round(len(batches) * (recipe.later if start else recipe.epochs)))
    settings = replace(recipe.groups, mu=mu)
    limit = Limit(_Fits(recipe, within)) if recipe.target_params and recipe.end_penalty else None
    search = GroupSearch(model, batches, settings, steps, recipe.seed, recipe.amp, recipe.compile, limit)
    notes = bound_notes(search)
    if start is not None:
        search.start_from(start)
    advance(search, folder)
    support, alive = search.alive(), search.alive(recipe.threshold) if recipe.threshold else search.alive()
    if recipe.threshold:
        late = len(set(alive) - set(support))
        notes.append(
            f"zero is read off norms of at most {recipe.threshold:g}; by the proximal step {late} more groups are zero."
        )
    if search.ended_at:
        notes.append(f"the penalty ended at step {search.ended_at} of {steps}, with what stays within the target.")
    state = search.state_dict()
    seconds = sum(line["step_ms"] for line in folder.lines) * 1e-3 * recipe.groups.norms_every
    ended = {k: state[k] for k in ("removed", "model", "optimizer", "batches", "steps")}
    ended |= {"mu": mu, "alive": alive, "lines": folder.lines, "notes": notes, "seconds": [seconds]}
    folder.save("end.pt", ended)
    return ended


class _Fits:
    """Which dead groups go so that the derived network is within the target; no cell loses its last path."""

    def __init__(self, recipe: SearchRecipe, within: CellSpace):
        self.recipe, self.within = recipe, within
        self.every = [".".join(choice) for choice in within.choices()]
        self.size = operation_params(within, recipe)
        self.fixed = full_params(within, recipe) - sum(self.size.values())

    def __call__(self, dead: list[str]) -> list[str] | None:
        left = self.fixed + sum(self.size.values())
        if left - sum(self.size[name] for name in dead) > self.recipe.target_params:
            return None
        gone: list[str] = []
        for name in dead:
            if left <= self.recipe.target_params:
                break
            if self._works({*gone, name}):
                gone.append(name)
                left -= self.size[name]
        return gone if left <= self.recipe.target_params else None

    def _works(self, gone: set[str]) -> bool:
        try:
            genotype_of(self.within, [name for name in self.every if name not in gone])
        except SpaceError:
            return False
        return True


def operation_params(within: CellSpace, recipe: SearchRecipe) -> dict[str, int]:
    """Parameters of every operation ("kind.edge.name") in the derived network, all its cells together."""
    with torch.device("meta"):
        cells = {k: within.edges(k) for k in within.kinds}
        options = {"pool_norm": False} if within.stacking == "darts" else {}
        network = within.network(cells, recipe.target_channels, recipe.target_cells, affine=True, **options)
    size = dict.fromkeys(alive_groups(network), 0)
    key = cell_key(network)
    for name, parameter in network.named_parameters():
        if ".edges." in name:
            size[key(name)] += parameter.numel()
    return size


def bound_notes(search: GroupSearch) -> list[str]:
    """What a reader must know about groups that are bound to vanish whatever the data."""
    bound = search.opt.bound_to_vanish()
    if not bound:
        return []
    kinds: dict[str, int] = {}
    for name in bound:
        kinds[name.split(".")[-1]] = kinds.get(name.split(".")[-1], 0) + 1
    told = ", ".join(f"{count} {name}" for name, count in kinds.items())
    return [
        f"{len(bound)} of {len(search.names)} groups are bound to be zeroed at the first step, whatever the data, "
        f"unless their gradients are huge ({told}): mu={search.opt.mu:g}, normalised '{search.settings.normalize}'."
    ]


def conclude(
    recipe: SearchRecipe, within: CellSpace, state: Mapping[str, Any], device: torch.device, folder: Folder
) -> Found:
    """The genotype of an end state, and the supernet's scores before and after it is discretised.

    The dead operations are put at exactly zero and the batch norms see the data again; then they are taken
    out. Both networks are scored: the accuracies are equal. The discretised one, with its weights, is written
    to ``folder``'s discretised.espalier.
    """
    model = new_supernet(recipe, within, device)
    take_out(model, state["removed"])
    model.load_state_dict(state["model"])
    alive = set(state["alive"])
    found = genotype_of(within, state["alive"])
    train = recipe.images.load("train")
    scores = {}
    held_out = recipe.images.load("validation") if recipe.images.validation else train
    split = "validation" if recipe.images.validation else "train"
    recalibrate(model, train)
    scores[f"{split} accuracy as trained"] = score(model, held_out)["accuracy"]
    dead = [name for name in alive_groups(model) if name not in alive]
    zero_out(model, dead)
    recalibrate(model, train)
    before = score(model, held_out)
    take_out(model, dead)
    after = score(model, held_out)
    scores[f"{split} accuracy of the supernet"] = before["accuracy"]
    scores[f"{split} accuracy discretised"] = after["accuracy"]
    if rank() == 0:
        save(model.cpu().eval(), folder.path / "discretised.espalier")
    if recipe.top:
        found = best_per_node(within, found, norms_of(state), recipe.top)
    return Found(found, found.params(recipe.target_channels, recipe.target_cells), scores, {})


def norms_of(state: Mapping[str, Any]) -> dict[str, float]:
    """The last norms that were logged."""
    return dict(state["lines"][-1]["norms"]) if state["lines"] else {}


def best_per_node(within: CellSpace, found: Genotype, strength: Mapping[str, float], top: int) -> Genotype:
    """Keep the ``top`` strongest operations that lead to each node, at most one per edge, as DARTS does.

    ``strength`` maps "kind.edge.operation" to a number.
    """
    cells: dict[str, dict[str, list[str]]] = {kind: {} for kind in within.kinds}
    for kind in within.kinds:
        best: dict[str, list[tuple[float, str, str]]] = {}
        for edge, names in found.edges(kind).items():
            value, name = max((strength.get(f"{kind}.{edge}.{n}", 0.0), n) for n in names)
            best.setdefault(edge.split("_")[1], []).append((value, edge, name))
        for choices in best.values():
            for _, edge, name in sorted(choices, reverse=True)[:top]:
                cells[kind][edge] = [name]
    return Genotype.of(within, cells)


Searcher = Callable[[SearchRecipe, Folder], Found]
