"""Pruning in one call: score, select, construct."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.construct import construct
from espalier.curvature.layout import Predicate, WeightLayout, convolution_and_linear
from espalier.errors import BudgetError, SpaceError
from espalier.saliency import Saliency, named, worth
from espalier.select.families import prune_structures
from espalier.select.layerwise import SELECTORS
from espalier.select.masking import apply_masks, hold_masks, zero_masks
from espalier.select.patterns import n_of_m
from espalier.select.reconstruct import reconstruct
from espalier.select.weights import WEIGHT_METHODS, output_loss, prune_weights
from espalier.space.budget import Budget
from espalier.space.latency import latency
from espalier.space.search_space import Keep, SearchSpace, search_space
from espalier.space.selection import select
from espalier.space.solution import Solution
from espalier.sparsify.groups import Groups

Loss = Callable[[nn.Module, Any], Tensor]
METHODS = (*SELECTORS, *WEIGHT_METHODS, "structured-chita")


def prune(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    budget: Budget,
    saliency: Saliency | str = "group_norm",
    method: str | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    levels: Sequence[str] = ("channel", "head"),
    keep: Sequence[Keep] = (),
    ranking: str = "global",
    steps: int = 1,
    finetune: Callable[[nn.Module], object] | None = None,
    **settings: Any,
) -> nn.Module:
    """The model without its least salient structures, within the budget, as an ordinary module.

    >>> model, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), torch.rand(8, 4)
    >>> prune(model, x, budget=Budget(params=0.5))[0].out_features
    7

    ``args`` and ``kwargs`` are example inputs, ``levels`` and ``keep`` as for the search space. ``saliency`` is the
    name of a score of :mod:`espalier.saliency` or a function; by default the energy of the parameters. Scores that
    look at gradients ("taylor", "cosine_magnitude") need ``data``, an iterable of batches, and ``loss(model, batch)``;
    by default a batch is (inputs, labels) and the loss is the cross-entropy. Their mean over the batches is used. What
    goes is what is worth little for what it costs (:func:`espalier.space.selection.select`), with ``ranking`` "global",
    "local" (every family keeps the same fraction) or "isomorphic" (families of one shape share theirs).

    With a ``method``, what goes and how the rest makes up for it are found together, and ``saliency`` is not looked at:

    - "omp", "backward", "ispasp", "ispasp-refit", "auxiliary", "gfs": units are chosen layer by layer so that the
      layers that read them can be refitted best (:mod:`espalier.select.reconstruct`); ``data`` are calibration
      batches, and labels in them are not needed.
    - "exchange++", "chita", "chita++", "exchange", "woodfisher", "cbs", "mfac", "weight-magnitude": single weights
      (:mod:`espalier.select.weights`) under ``Budget(weights=...)``, a share of all convolution and linear weights.
      Without a method, such a budget takes "exchange++", or "weight-magnitude" where there is no data.
    - "structured-chita": structures by the same second-order model (:mod:`espalier.select.families`).

    ``settings`` are further arguments of the method's function.

    ``steps`` > 1 tightens the budget step by step; ``finetune(model)`` is called with the smaller network after each,
    in which what is masked rather than removed (kernels, single weights) stays zero, whatever `torch.optim` optimizer
    it uses; for a later fine-tuning of your own see :func:`espalier.select.hold_masks`.
    ``model`` is not changed. Raises :class:`BudgetError`, naming the nearest, where the budget cannot be met,
    :class:`SpaceError` where there is nothing to remove or data is missing, and :class:`InvalidSolution` if what is
    built does not compute.
    """
    if steps < 1:
        raise BudgetError(f"steps={steps}: at least one.")
    if method is None and "weights" in budget.given:
        method = "weight-magnitude" if data is None else "exchange++"
    if method is not None and method not in METHODS:
        raise SpaceError(f"no method is called '{method}': there are {', '.join(METHODS)}.")
    if method is None and settings:
        raise TypeError(f"{', '.join(settings)}: settings are for a method, and there is none.")
    if method is not None and ranking != "global":
        raise TypeError(
            f"ranking={ranking!r} ranks saliencies, which method='{method}' does not look at: leave it out."
        )
    if method in WEIGHT_METHODS and (keep or budget.shapes_widths):
        wrong = "keep=" if keep else "round_to, min_keep and max_keep"
        raise TypeError(f"{wrong} is about structures; '{method}' prunes single weights: say which with prunable=.")
    small = copy.deepcopy(model)
    full: dict[str, float] = {}
    for step in range(1, steps + 1):
        space = search_space(small, args, kwargs, levels=levels, keep=keep)
        full = full or _amounts(space, budget, settings.get("prunable", convolution_and_linear))
        wanted = budget if steps == 1 else budget.tightened(step / steps, full)
        if method is None:
            selection = select(space, _worth(space, named(saliency), data, loss), wanted, ranking)
            solution = space.solution(selection.removed, {"method": "prune", "amounts": dict(selection.amounts)})
        else:
            space, solution = _by_method(space, method, wanted, data, loss, settings)
        small = construct(space, solution)
        if finetune is not None:
            masks = solution.masks
            if any(space.families[k].level == "kernel" for k in space.removed_of(solution.removed)):
                masks = zero_masks(small) | dict(masks)
            held = hold_masks(small, masks)
            try:
                finetune(small)
            finally:
                held.remove()
            apply_masks(small, masks)  # also after a fine-tuning without any optimizer
    return small


def _by_method(
    space: SearchSpace,
    method: str,
    budget: Budget,
    data: Iterable[Any] | None,
    loss: Loss | None,
    settings: dict[str, Any],
) -> tuple[SearchSpace, Solution]:
    """The space of the model with refitted weights, and the solution for it."""
    on_outputs = nn.functional.cross_entropy if loss is None else output_loss(loss)
    if method in WEIGHT_METHODS:
        if set(budget.given) != {"weights"}:
            raise BudgetError(f"method='{method}' prunes single weights: give Budget(weights=...) alone, not {budget}.")
        layout = WeightLayout.of(space.model, settings.get("prunable", convolution_and_linear))
        most = budget.bounds({"weights": float(layout.numel)})["weights"]
        if settings.get("pattern") is not None:
            least = n_of_m(layout, *settings["pattern"]).kept
            if least > most * (1 + 1e-9):
                raise BudgetError(
                    f"pattern={settings['pattern']} keeps {least / layout.numel:.3g} of the weights, above {budget}."
                )
        space, solution = prune_weights(space, data, on_outputs, most / layout.numel, method, **settings)
        if (kept := solution.provenance["kept"]) > most * (1 + 1e-9) + 1e-9:
            raise BudgetError(
                f"{budget}: the nearest that method='{method}' with these settings meets is {kept} weights."
            )
        return space, solution
    if data is None:
        raise SpaceError(f"method='{method}' needs data=, calibration batches.")
    if method in SELECTORS:
        return reconstruct(space, data, budget, method=method, **settings)
    return prune_structures(space, data, on_outputs, budget, **settings)


def _amounts(space: SearchSpace, budget: Budget, prunable: Predicate) -> dict[str, float]:
    """Of the network as it came, for every bound."""
    known: dict[str, float] = {"structures": float(len(space)), **vars(space.cost())}
    if "weights" in budget.given:
        known["weights"] = float(WeightLayout.of(space.model, prunable).numel)
    if "latency" in budget.given:
        known["latency"] = latency(space.model, space.trace.args, space.trace.kwargs)
    return known


def _worth(space: SearchSpace, saliency: Saliency, data: Iterable[Any] | None, loss: Loss | None) -> Tensor:
    groups = Groups(space)
    if data is None:
        gradients = [torch.zeros_like(t) for t in groups.tensors]
        scores = saliency(space, groups.state(gradients)).float()
        if not scores.any():
            raise SpaceError("this saliency is zero everywhere without gradients: give data= (and loss=).")
        return worth(saliency, scores, groups.size)
    total, count = torch.zeros(len(space), device=groups.group.device), 0
    for batch in data:
        space.model.zero_grad()
        (_cross_entropy if loss is None else loss)(space.model, batch).backward()
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in groups.tensors]
        total += saliency(space, groups.state(gradients)).to(total)
        count += 1
    space.model.zero_grad()
    if not count:
        raise SpaceError("data= has no batches: nothing to score with (an iterator may have been used up).")
    return worth(saliency, total / count, groups.size)


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)
