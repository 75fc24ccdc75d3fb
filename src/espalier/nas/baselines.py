"""What GS-NAS is compared with, under the same recipe: H2SPG, first-order DARTS, PC-DARTS, random search."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.data import Batches
from espalier.errors import SpaceError
from espalier.nas.genotype import Genotype
from espalier.nas.gs_nas import conclude, full_params, new_batches, new_supernet, operation_params
from espalier.nas.loop import Folder, Line, advance, endless, own_device, rank, seed_step, world
from espalier.nas.mixed import discretise, mix, strengths, strongest
from espalier.nas.recipe import SearchRecipe
from espalier.nas.result import Found
from espalier.nas.score import recalibrate, score
from espalier.nas.space import CellSpace
from espalier.nas.spaces import space
from espalier.nas.supernet import alive_groups, operation_groups, supernet_space
from espalier.nas.training import Training
from espalier.space.budget import Budget
from espalier.space.cost import count_macs
from espalier.sparsify.halfspace import H2SPG


def h2spg(recipe: SearchRecipe, folder: Folder) -> Found:
    """Search with H2SPG over the operations, tied over cells; its budget follows from the target.

    A third of the steps is warm-up, a third goes to projecting, and the rest trains what stays. As operations without
    weights cost no parameters, the same share of the number of operations goes, and their scalars are ranked apart.
    """
    within, device, start = space(recipe.space), own_device(recipe.device), time.perf_counter()
    model, batches = new_supernet(recipe, within, device), new_batches(recipe, device)
    shape = batches.dataset.shape
    tied = supernet_space(model, torch.zeros(2, *shape, device=device))
    steps = max(3, round(len(batches) * recipe.epochs))
    params, operations = _shares(recipe, within, model)
    opt = H2SPG(
        tied,
        budget=Budget(params=params, structures=operations),
        saliency="balanced",
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        warmup_steps=max(1, steps // 3),
        projection_steps=max(1, steps // 3),
    )
    training = Training(
        model, opt, batches, steps, recipe.lr, recipe.seed, every=recipe.groups.norms_every, amp=recipe.amp
    )
    training = _WithNorms(training)
    advance(training, folder)
    removed = set(opt.solution().removed)
    alive = [name for name in alive_groups(model) if name not in removed]
    state = {"removed": [], "model": model.state_dict(), "alive": alive, "lines": folder.lines}
    found = conclude(recipe, within, state, device, folder)
    return replace(found, cost=_cost(steps, recipe, folder, start), lines=folder.lines)


class _WithNorms:
    """A training whose log has the groups' norms."""

    def __init__(self, training: Training):
        self.training = training
        self.steps = training.steps
        self._groups = operation_groups(training.model)
        self._own = dict(training.model.named_parameters())

    @property
    def done(self) -> int:
        return self.training.done

    def step(self) -> Line | None:
        line = self.training.step()
        if line is None:
            return None
        squares = torch.zeros(len(self._groups), dtype=torch.float64)
        with torch.no_grad():
            for name, owner in self._groups.owner.items():
                squares[int(owner)] += float(self._own[name].double().square().sum())
        norms = squares.sqrt().tolist()
        line["zero"] = sum(n == 0 for n in norms)
        line["norms"] = {name: float(f"{n:.4g}") for name, n in zip(self._groups.names, norms, strict=True)}
        return line

    def state_dict(self) -> dict[str, Any]:
        return self.training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.training.load_state_dict(state)


def _shares(recipe: SearchRecipe, within: CellSpace, model: nn.Module) -> tuple[float, float]:
    """The fractions of the supernet's parameters, and of its operations, that the target amounts to.

    Estimated: an operation's share of the supernet and of the derived network differ a little.
    """
    if not recipe.target_params:
        return 0.5, 0.5
    full = full_params(within, recipe)
    fixed = full - sum(operation_params(within, recipe).values())
    if recipe.target_params <= fixed:
        raise SpaceError(f"target_params={recipe.target_params:g}: without any operation there are {fixed:,} already.")
    kept = min(1.0, (recipe.target_params - fixed) / (full - fixed))
    own = sum(p.numel() for p in model.parameters())
    operations = float(operation_groups(model).size.sum())
    return (own - operations + kept * operations) / own, kept


# DARTS.


def darts(recipe: SearchRecipe, folder: Folder, part: int = 1) -> Found:
    """First-order DARTS: weights on one half of the training images, architecture parameters on the other.

    ``part`` = 4 is PC-DARTS, which leaves the architecture parameters alone in the first 15 of 50 epochs.
    """
    within, device, start = space(recipe.space), own_device(recipe.device), time.perf_counter()
    model = new_supernet(recipe, within, device, scalars=False)
    architecture = mix(model, within, part, recipe.seed).to(device)
    model.to(device)
    train, other = _halves(recipe, device)
    steps = max(1, round(len(new_batches(recipe, device)) * recipe.epochs))
    opt = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    every = recipe.groups.norms_every
    training = Training(model, opt, train, steps, recipe.lr, recipe.seed, every=every, amp=recipe.amp)
    stepper = _TwoLevel(training, architecture, other, first=round(0.3 * steps) if part > 1 else 0)
    advance(stepper, folder)
    found = strongest(within, strengths(architecture))
    held_out = recipe.images.load("validation") if recipe.images.validation else train.dataset
    recalibrate(model, train.dataset)
    scores = {"validation accuracy of the supernet": score(model, held_out)["accuracy"]}
    discretise(model, found)
    scores["validation accuracy discretised, as it was"] = score(model, held_out)["accuracy"]
    recalibrate(model, train.dataset)
    scores["validation accuracy discretised"] = score(model, held_out)["accuracy"]
    params = found.params(recipe.target_channels, recipe.target_cells)
    return Found(found, params, scores, _cost(steps, recipe, folder, start), folder.lines)


def pc_darts(recipe: SearchRecipe, folder: Folder) -> Found:
    """PC-DARTS: a quarter of the channels goes through the operations, and edges have weights of their own."""
    return darts(recipe, folder, part=4)


class _TwoLevel:
    """Before each step of the weights, one of the architecture parameters on the other half of the images."""

    def __init__(self, training: Training, architecture: nn.ModuleDict, batches: Batches, first: int):
        self.training, self.architecture, self.batches, self.first = training, architecture, batches, first
        self.opt = torch.optim.Adam(architecture.parameters(), lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
        self.steps = training.steps
        # 3e-4 is meant for 50 epochs of 390 steps; a shorter search goes as far with a larger one
        self.opt.param_groups[0]["lr"] = min(3e-4 * max(1.0, 19_500 / self.steps), 0.02)
        self._data = endless(batches)

    @property
    def done(self) -> int:
        return self.training.done

    def step(self) -> Line | None:
        if self.done >= self.first:
            x, y = next(self._data)
            seed_step(self.training.seed + 1, self.done)
            self.training.model.train()
            self.opt.zero_grad()
            out: Tensor = self.training.model(x)
            cross_entropy(out, y).backward()
            _average(self.architecture)
            self.opt.step()
        line = self.training.step()
        if line is not None:
            line["norms"] = {name: float(f"{value:.4g}") for name, value in strengths(self.architecture).items()}
        return line

    def state_dict(self) -> dict[str, Any]:
        return {
            "training": self.training.state_dict(),
            "architecture": self.architecture.state_dict(),
            "adam": self.opt.state_dict(),
            "other": self.batches.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.training.load_state_dict(state["training"])
        self.architecture.load_state_dict(state["architecture"])
        self.opt.load_state_dict(state["adam"])
        self.batches.load_state_dict(state["other"])
        self._data = endless(self.batches)


def _average(architecture: nn.Module) -> None:
    """The same gradient of the architecture parameters on every rank."""
    if world() > 1:
        for p in architecture.parameters():
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
                p.grad /= world()


def _halves(recipe: SearchRecipe, device: torch.device) -> tuple[Batches, Batches]:
    whole = new_batches(recipe, device)
    half = len(whole.dataset) // 2
    rows = whole.dataset.rows[torch.randperm(len(whole.dataset), generator=_generator(recipe)).numpy()]
    parts = [replace(whole.dataset, rows=rows[:half]), replace(whole.dataset, rows=rows[half:])]
    made = [
        Batches(part, recipe.batch_size, recipe.seed + i, whole.augment, True, True, device, rank=rank(), world=world())
        for i, part in enumerate(parts)
    ]
    return made[0], made[1]


# Random search.


def random_search(recipe: SearchRecipe, folder: Folder) -> Found:
    """Train a few random genotypes of the target's size for themselves, and keep the best on held-out images.

    Together they cost as many multiply-accumulates as the supernet's training in GS-NAS would.
    """
    within, device, start = space(recipe.space), own_device(recipe.device), time.perf_counter()
    batches = new_batches(recipe, device)
    shape, classes = batches.dataset.shape, batches.dataset.classes
    example = (torch.zeros(1, *shape),)
    steps = round(len(batches) * recipe.epochs)
    whole = count_macs(within.supernet(recipe.channels, recipe.cells, classes, shape[0]), example) * steps
    generator, done, best = _generator(recipe), 0, None
    held_out = recipe.images.load("validation") if recipe.images.validation else batches.dataset
    lines: list[Line] = []
    for i in range(recipe.candidates):
        found = random_genotype(within, recipe, generator)
        torch.manual_seed(recipe.seed + i)
        model = found.network(recipe.channels, recipe.cells, classes, in_channels=shape[0])
        own = max(1, round(whole / recipe.candidates / count_macs(model, example)))
        model.to(device)
        opt = torch.optim.SGD(model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        part, own_batches = folder.below(f"candidate-{i}"), new_batches(recipe, device)
        advance(Training(model, opt, own_batches, own, recipe.lr, recipe.seed, amp=recipe.amp), part)
        recalibrate(model, batches.dataset)
        accuracy = score(model, held_out)["accuracy"]
        params = found.params(recipe.target_channels, recipe.target_cells)
        lines.append({"candidate": i, "steps": own, "params": params, "accuracy": accuracy})
        folder.tell(lines[-1])
        done += own
        if best is None or accuracy > best[0]:
            best = (accuracy, found, params)
    assert best is not None
    cost = {"steps": done, "images": done * recipe.batch_size, "wall_s": round(time.perf_counter() - start, 1)}
    cost["equal_steps"] = steps
    return Found(best[1], best[2], {"validation accuracy of the best candidate": best[0]}, cost, lines)


def random_genotype(within: CellSpace, recipe: SearchRecipe, generator: torch.Generator) -> Genotype:
    """Operations in random order, as many as fit the target; with ``top``, so many per node, at most one an edge."""
    choices = list(within.choices())
    if recipe.top:
        draw = torch.rand(len(choices), generator=generator).tolist()
        return strongest(within, {".".join(c): value for c, value in zip(choices, draw, strict=True)}, recipe.top)
    size = operation_params(within, recipe)
    left = (
        (recipe.target_params or 0.5 * full_params(within, recipe)) - full_params(within, recipe) + sum(size.values())
    )
    cells: dict[str, dict[str, list[str]]] = {kind: {} for kind in within.kinds}
    for i in torch.randperm(len(choices), generator=generator).tolist():
        kind, edge, name = choices[i]
        own = size[".".join(choices[i])]
        if own <= left:
            left -= own
            cells[kind].setdefault(edge, []).append(name)
    return Genotype.of(within, cells)


def _generator(recipe: SearchRecipe) -> torch.Generator:
    return torch.Generator().manual_seed(recipe.seed)


def _cost(steps: int, recipe: SearchRecipe, folder: Folder, start: float) -> dict[str, float]:
    seconds = sum(line["step_ms"] for line in folder.lines) * 1e-3 * recipe.groups.norms_every
    wall = round(time.perf_counter() - start, 1)
    return {"steps": steps, "images": steps * recipe.batch_size, "seconds": round(seconds, 1), "wall_s": wall}
