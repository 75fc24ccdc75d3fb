"""Single weights of any model: from a search space to a solution with masks, by every weight selector."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from espalier.curvature.batches import is_pair, pair_of, samples
from espalier.curvature.dual import DualInverse
from espalier.curvature.gradients import Gradients, gradients
from espalier.curvature.layout import Predicate, WeightLayout, convolution_and_linear
from espalier.curvature.per_layer import Loss
from espalier.curvature.woodbury import BlockWoodburyInverse
from espalier.errors import BudgetError, SpaceError
from espalier.select.cbs import cbs
from espalier.select.magnitude import erdos_renyi_kernel, magnitude
from espalier.select.multistage import Data, StageOptions, densities, draw, in_stages
from espalier.select.obs import brain_surgeon
from espalier.select.patterns import Quota, cardinality, count_of, n_of_m, per_layer
from espalier.select.problem import Problem
from espalier.select.result import Result
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution

Layers = Literal["together", "each", "erk"]
Allowed = Callable[[WeightLayout, float], Quota]
WeightMethod = Callable[[nn.Module, Loss, Data, float, Allowed, StageOptions, Predicate], tuple[Result, nn.Module]]
"""From (model in eval mode, loss(output, target), data, fraction to keep, what is allowed, options, which weights)
to the result and the pruned copy of the model."""


def prune_weights(
    space: SearchSpace,
    data: Iterable[Any] | tuple[Tensor, Tensor] | None = None,
    loss: Loss = nn.functional.cross_entropy,
    keep: float = 0.1,
    method: str = "exchange++",
    *,
    layers: Layers = "together",
    pattern: tuple[int, int] | None = None,
    options: StageOptions | Mapping[str, Any] | None = None,
    prunable: Predicate = convolution_and_linear,
) -> tuple[SearchSpace, Solution]:
    """Keep the fraction `keep` of all prunable weights; the others become zeros, and those that stay are adjusted.

    >>> from espalier import construct, search_space
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> data = torch.randn(200, 4), torch.randint(2, (200,))
    >>> options = StageOptions(stages=2, n=40, batch=4)
    >>> space, solution = prune_weights(search_space(model, data[0]), data, keep=0.25, options=options)
    >>> sum(int((p != 0).sum()) for p in construct(space, solution).parameters() if p.ndim == 2), solution.removed
    (24, ())

    Returns the search space of a copy of the model with the new weights, and the solution for it, whose masks say per
    parameter name what stays; `space.model` is not changed. The copy is judged in eval mode and keeps its mode.

    data: a pair (inputs, targets), from which samples are drawn, or a loader of such pairs that shuffles by itself;
    several inputs are a tuple or a dict of tensors, the model's positional or keyword arguments; magnitude needs
    none. loss(output, target): a mean over samples. method: a name of `WEIGHT_METHODS`. layers: one budget for all
    tensors "together", the same fraction of "each", or "erk", Erdős-Rényi-kernel densities. pattern: (n, m) keeps n
    of every m neighbours instead, and `keep` is not looked at. options: the method's own by default
    (`WEIGHT_OPTIONS`), with fewer samples, and a warning, where the data has fewer; a mapping changes what it names
    in them, as in ``{"n": 40}``, and a `StageOptions` takes their place, but for the solver, which is the method's.
    prunable: which parameters; by default the ``weight`` of convolution and linear layers, so neither biases, norms
    and embeddings nor what other modules hold themselves (``in_proj_weight`` of `nn.MultiheadAttention`).

    Raises SpaceError for an unknown method or missing data, BudgetError for a fraction outside (0, 1] or a pattern
    beside layers=, ValueError as `gradients` does (tied or frozen weights, too little data) and for
    options of several stages where the method has one.
    """
    if not 0 < keep <= 1:
        raise BudgetError(f"weights={keep}: the fraction of weights that stays must lie in (0, 1].")
    samples = cast(Data, list(data) if hasattr(data, "__next__") else data)  # type: ignore[call-overload]
    chosen = method_options(method, options, samples, layers, pattern)
    model = copy.deepcopy(space.model)
    modes = {name: module.training for name, module in model.named_modules()}
    if count_of(keep, WeightLayout.of(model, prunable).numel) < 1:
        raise BudgetError(f"weights={keep}: not one weight would stay of the {WeightLayout.of(model, prunable).numel}.")
    result, pruned = WEIGHT_METHODS[method](
        model.eval(), loss, samples, keep, quotas(layers, pattern), chosen, prunable
    )
    for name, module in pruned.named_modules():
        module.training = modes[name]
    again = space.of(pruned)
    layout = WeightLayout.of(pruned, prunable)
    provenance = {"method": method, "layers": layers, "pattern": pattern, "weights": result.kept / layout.numel}
    provenance |= {"kept": result.kept, "of": layout.numel}
    if data is not None:
        provenance |= {"objective": result.objective, "n": chosen.n, "batch": chosen.batch, "ridge": chosen.ridge}
    return again, Solution((), again.fingerprint, result.masks(layout), provenance)


def method_options(
    method: str,
    options: StageOptions | Mapping[str, Any] | None,
    data: Data | None,
    layers: Layers = "together",
    pattern: tuple[int, int] | None = None,
) -> StageOptions:
    """The method's options with what the caller wants changed; raises for what the method cannot do."""
    if method not in WEIGHT_METHODS:
        raise SpaceError(f"no method for weights is called '{method}': there are {', '.join(WEIGHT_METHODS)}.")
    if pattern is not None and layers != "together":
        raise BudgetError(f"pattern={pattern} is a budget of its own: leave layers={layers!r} out.")
    if data is None and method != "weight-magnitude":
        raise SpaceError(f"method='{method}' needs data=, pairs of inputs and targets.")
    usual = WEIGHT_OPTIONS[method]
    changes = {} if isinstance(options, StageOptions) else dict(options or {})
    known = {f.name for f in fields(StageOptions)} - {"solver"}
    wrong = sorted(set(changes) - known)
    if wrong:
        raise ValueError(f"options: '{wrong[0]}' is none of {', '.join(sorted(known))}")
    whole = isinstance(options, StageOptions)
    chosen = replace(options, solver=usual.solver) if whole else replace(usual, **changes)
    if usual.stages == 1 != chosen.stages:
        several = f"take '{method}++' for several, or " if f"{method}++" in WEIGHT_METHODS else ""
        raise ValueError(
            f"'{method}' is one stage, and these options have {chosen.stages}: {several}change single settings of the "
            f"method's own, as in options={{'n': {chosen.n}}}"
        )
    if whole or data is None or method == "weight-magnitude" or {"n", "batch"} & set(changes):
        return chosen
    return fitted(chosen, data)


def output_loss(loss: Callable[[Any, Any], Tensor]) -> Loss:
    """A loss(output, target) from a loss(model, (inputs, targets)) that calls the model once on the inputs.

    >>> by_model = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
    >>> output_loss(by_model)(torch.ones(2), torch.zeros(2))
    tensor(1.)
    """

    def on_output(output: Any, target: Any) -> Tensor:
        try:
            return loss(lambda *_, **__: output, (None, target))
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"loss= is called as loss(model, batch) and calls the model once on the batch's inputs: {error}. "
                "For a loss of (output, target) write loss=lambda model, batch: yours(model(batch[0]), batch[1])"
            ) from error

    return on_output


def fitted(options: StageOptions, data: Data) -> StageOptions:
    """The same options with fewer gradients and samples where the data does not hold n · batch of them."""
    wanted, count = options.n * options.batch, 0
    if is_pair(data):
        count = samples(data[0])
    else:
        sized = getattr(data, "dataset", None)
        if sized is not None and hasattr(sized, "__len__") and not getattr(data, "drop_last", False):
            count = len(sized)
        for batch in () if count else cast(Iterable[Any], data):
            count += samples(pair_of(batch)[0])
            if count >= wanted:
                break
    if count >= wanted or count == 0:
        return options
    n = max(1, min(count, int(options.n * math.sqrt(count / wanted))))
    made = replace(options, n=n, batch=max(1, count // n))
    warnings.warn(
        f"the data has {count} samples: n = {made.n} gradients of {made.batch} samples each are used, "
        f"instead of {options.n} of {options.batch}",
        stacklevel=3,
    )
    return made


def quotas(layers: Layers, pattern: tuple[int, int] | None) -> Allowed:
    """What is allowed, given a layout and a fraction to keep; see `prune_weights`."""
    if pattern is not None:
        return lambda layout, _: n_of_m(layout, *pattern)
    kinds: dict[str, Allowed] = {
        "together": lambda layout, keep: cardinality(count_of(keep, layout.numel), layout.numel),
        "each": per_layer,
        "erk": erdos_renyi_kernel,
    }
    if layers not in kinds:
        raise BudgetError(f"layers={layers!r}: 'together', 'each' or 'erk'.")
    return kinds[layers]


def _staged(
    model: nn.Module,
    loss: Loss,
    data: Data,
    keep: float,
    allowed: Allowed,
    options: StageOptions,
    prunable: Predicate,
) -> tuple[Result, nn.Module]:
    path = densities(options.schedule, options.stages, keep)
    return in_stages(model, loss, data, allowed, options, prunable, path)


def _once(choose: Callable[[Gradients, Quota, StageOptions], Result]) -> WeightMethod:
    """A method that looks at one set of gradients."""

    def method(
        model: nn.Module,
        loss: Loss,
        data: Data,
        keep: float,
        allowed: Allowed,
        options: StageOptions,
        prunable: Predicate,
    ) -> tuple[Result, nn.Module]:
        sample = draw(data, options.n * options.batch, torch.Generator().manual_seed(options.seed))
        found = gradients(model, loss, sample, options.n, options.batch, prunable, options.gradient).gathered()
        result = choose(found, allowed(found.layout, keep), options)
        pruned = copy.deepcopy(model)
        found.layout.write(pruned, result.weights)
        return result, pruned

    return method


def _woodfisher(found: Gradients, quota: Quota, options: StageOptions) -> Result:
    inverse = BlockWoodburyInverse(found.A, options.ridge, sizes=tuple(found.layout.sizes))
    return brain_surgeon(Problem.of(found.A, None, found.w_bar, options.ridge), quota, inverse)


def _mfac(found: Gradients, quota: Quota, options: StageOptions) -> Result:
    problem = Problem.of(found.A, None, found.w_bar, options.ridge)
    return brain_surgeon(problem, quota, DualInverse(found.A, options.ridge))


def _magnitude(
    model: nn.Module,
    loss: Loss,
    data: Data,
    keep: float,
    allowed: Allowed,
    options: StageOptions,
    prunable: Predicate,
) -> tuple[Result, nn.Module]:
    layout = WeightLayout.of(model, prunable)
    result = magnitude(layout.flatten(model), allowed(layout, keep))
    pruned = copy.deepcopy(model)
    layout.write(pruned, result.weights)
    return result, pruned


_ONCE = StageOptions(stages=1, n=1000, batch=10, ridge=1e-3, first_order=False)

WEIGHT_OPTIONS: Mapping[str, StageOptions] = {
    "exchange++": StageOptions(schedule="cubic", solver="exchange", recalibrate=500),
    "exchange": replace(_ONCE, recalibrate=500),
    "chita++": StageOptions(solver="magnitude", drop_dead=False, recalibrate=500),
    "chita": replace(_ONCE, solver="iht", drop_dead=False),
    "woodfisher": _ONCE,
    "cbs": _ONCE,
    "mfac": _ONCE,
    "weight-magnitude": _ONCE,
}
"""What each method of `WEIGHT_METHODS` uses unless told otherwise.

λ and the number of stages decide most: choose them on held-out data (in our tables, λ from 1e-3 for a small fully
connected network to 0.1 for a residual one). Where a method says `recalibrate`, batch norm statistics are taken anew.
"""

WEIGHT_METHODS: Mapping[str, WeightMethod] = {
    "exchange++": _staged,
    "exchange": _staged,
    "chita++": _staged,
    "chita": _staged,
    "woodfisher": _once(_woodfisher),
    "cbs": _once(lambda found, quota, options: cbs(found.A, found.w_bar, quota, options.ridge)),
    "mfac": _once(_mfac),
    "weight-magnitude": _magnitude,
}
"""Weight selectors by name: "exchange++" (the default) and "chita++" in stages with fresh gradients, the others once.

"chita" and "chita++" are the paper's solver and procedure, "exchange" and "exchange++" the same problem solved by
exact exchanges (`espalier.select.exchange`); "woodfisher", "cbs" and "mfac" are the baselines, "weight-magnitude" the
largest weights as they are.
"""
