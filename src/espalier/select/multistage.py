"""CHITA++: prune in stages, each with fresh gradients at the weights of the one before."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from espalier.batchnorm import recalibrate
from espalier.curvature.batches import Tree, as_loader, is_pair, mapped, pair_of, samples
from espalier.curvature.gradients import GradientOptions, Gradients, gradients
from espalier.curvature.layout import Predicate, WeightLayout, convolution_and_linear
from espalier.curvature.matrix import dead_columns
from espalier.curvature.per_layer import Loss
from espalier.curvature.watch import Watch, unwatched, watching
from espalier.select.chita import Solver, solve
from espalier.select.patterns import Quota, cardinality, count_of
from espalier.select.problem import Problem
from espalier.select.result import Result
from espalier.select.steps import Steps, in_batches, step_on_support

Schedule = Literal["exponential", "linear", "constant", "cubic"]
Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def densities(schedule: Schedule, stages: int, keep: float) -> list[float]:
    """The fraction of weights that stays after each stage, ending at `keep`.

    >>> densities("linear", 2, 0.5)
    [0.75, 0.5]

    exponential: keep^(t/f), ever smaller steps in sparsity; linear: 1 − τt/f; cubic: 1 − τ(1 − (1 − t/f)³);
    constant: `keep` at once, then again and again. τ = 1 − keep, t = 1 … f stages.
    """
    if stages < 1:
        raise ValueError(f"stages = {stages}: at least one is needed")
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}: the fraction of weights to keep must lie in (0, 1]")
    tau, steps = 1 - keep, [t / stages for t in range(1, stages + 1)]
    match schedule:
        case "exponential":
            out = [math.exp(x * math.log(keep)) for x in steps]
        case "linear":
            out = [1 - tau * x for x in steps]
        case "cubic":
            out = [1 - tau * (1 - (1 - x) ** 3) for x in steps]
        case "constant":
            out = [keep for _ in steps]
        case _:
            raise ValueError(f"unknown schedule {schedule!r}: exponential, linear, cubic or constant")
    return [*out[:-1], keep]


@dataclass(frozen=True)
class StageOptions:
    """Settings of CHITA++; one stage without first-order term is CHITA.

    stages, schedule: see `densities`. n, batch: gradients per stage and samples averaged in each. ridge: λ.
    first_order: use the gradient itself, not only the curvature. drop_dead: weights whose gradient is zero
    on all samples (a pixel that is always black) do not change the model of the loss; they are dropped
    rather than kept for the ridge's sake. seed: draws the samples, where the data is a pair of tensors.
    recalibrate: samples (of the stage's own) over which batch norm statistics are taken anew after each stage; 0
    leaves them as they are. free: what is not prunable (norms, biases) is refitted along with the weights that stay,
    which problem (5) allows though the paper does not do it. steps: on the support, after each stage's pruning
    (a result's objective is of the weights before them).
    """

    stages: int = 15
    schedule: Schedule = "exponential"
    n: int = 1000
    batch: int = 16
    ridge: float = 1e-2
    first_order: bool = True
    solver: Solver = "exchange"
    drop_dead: bool = True
    seed: int = 0
    recalibrate: int = 0
    free: bool = False
    steps: Steps = field(default_factory=Steps)
    gradient: GradientOptions = field(default_factory=GradientOptions)

    def __post_init__(self) -> None:
        if self.stages < 1 or self.n < 1 or self.batch < 1 or self.recalibrate < 0:
            raise ValueError(
                f"stages={self.stages}, n={self.n}, batch={self.batch}, recalibrate={self.recalibrate}: the last is at "
                "least 0, the others at least 1"
            )
        if not 0 < self.ridge < math.inf:
            raise ValueError(f"ridge={self.ridge}: λ is a number above 0")


def chita_plus_plus(
    model: nn.Module,
    loss: Loss,
    data: Data,
    keep: float | Callable[[WeightLayout, float], Quota],
    options: StageOptions | None = None,
    prunable: Predicate = convolution_and_linear,
    path: Sequence[float] | None = None,
    on_stage: Callable[[int, nn.Module, Result], None] | None = None,
) -> Result:
    """Prune a model one-shot, in stages: Algorithm 1 of the paper. The model itself is left as it is.

    >>> model = nn.Linear(4, 2, bias=False).eval()
    >>> data = torch.randn(64, 4), torch.randint(2, (64,))
    >>> options = StageOptions(stages=2, n=16, batch=2)
    >>> chita_plus_plus(model, nn.functional.cross_entropy, data, 0.5, options).kept
    4

    At stage t: A from a fresh batch at wᵗ⁻¹, then wᵗ solves problem (5) with w̄ = wᵗ⁻¹ and
    k = ⌊keepₜ · p⌋. `path` gives the densities themselves instead of a schedule (`keep` is then ignored).
    `on_stage(t, copy of the model, result)` is called after each stage. Returns the last stage's result,
    whose history holds the objective of every stage; `WeightLayout.write` applies it. ValueError with `options.free`,
    whose other weights no `Result` holds.
    """
    if options is not None and options.free:
        raise ValueError("free=True changes more than the prunable weights: use in_stages, which returns the model")
    return in_stages(model, loss, data, keep, options, prunable, path, on_stage)[0]


def in_stages(
    model: nn.Module,
    loss: Loss,
    data: Data,
    keep: float | Callable[[WeightLayout, float], Quota],
    options: StageOptions | None = None,
    prunable: Predicate = convolution_and_linear,
    path: Sequence[float] | None = None,
    on_stage: Callable[[int, nn.Module, Result], None] | None = None,
) -> tuple[Result, nn.Module]:
    """`chita_plus_plus` with the pruned copy of the model, whose batch norm statistics may be new too."""
    options = options or StageOptions()
    steps = list(path) if path is not None else densities(options.schedule, options.stages, _fraction(keep))
    if not steps:
        raise ValueError("path is empty: give the density after each stage, one at least")
    if len(steps) > 1 and _repeats(data):
        warnings.warn(
            "the data gives the same samples each time, so that every stage sees the same ones: pass a loader that "
            "shuffles, or a pair of tensors",
            stacklevel=2,
        )
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(options.seed)
    layout = WeightLayout.of(model, prunable)
    taken = _any_trainable(prunable) if options.free else prunable
    mine = WeightLayout.of(model, taken).holds(layout.names) if options.free else None
    result, history = None, []
    with _watched(options, len(steps), layout.numel) as (watch, inner):
        for stage, density in enumerate(watch(steps, "stages"), 1):
            sample = draw(data, options.n * options.batch, generator)
            try:
                found = gradients(model, loss, sample, options.n, options.batch, taken, inner).gathered()
            except ValueError as error:
                raise ValueError(f"stage {stage} of {len(steps)}: {error}") from error
            k = count_of(density, layout.numel)
            quota = keep(layout, density) if callable(keep) else cardinality(k, layout.numel)
            with watching(inner.progress, lambda kept=quota.kept: f"{kept:,} of {layout.numel:,} weights") as rounds:
                result = prune_once(found.A, found.w_bar, quota, options, mine, rounds)
            found.layout.write(model, result.weights)
            if options.recalibrate:
                recalibrate(model, inputs_of(sample), options.recalibrate)
            if options.steps.count:
                result = _stepped(model, loss, data, found, result, options, generator)
                if options.recalibrate:
                    recalibrate(model, inputs_of(sample), options.recalibrate)
            if mine is not None:
                result = replace(result, weights=result.weights[mine], support=result.support[mine])
            history.append(result.objective)
            if on_stage is not None:
                on_stage(stage, model, result)
    assert result is not None
    return replace(result, history=tuple(history)), model


@contextmanager
def _watched(options: StageOptions, stages: int, p: int) -> Iterator[tuple[Watch, GradientOptions]]:
    """One bar over all stages in place of one for each stage's gradients; the options for those."""
    if stages == 1:
        yield unwatched, options.gradient
        return
    cost = f"{stages} stages, each with {options.n} gradients of {options.batch} samples, for {p:,} weights"
    with watching(options.gradient.progress, lambda: cost) as watch:
        yield watch, replace(options.gradient, progress=False)


def _stepped(
    model: nn.Module,
    loss: Loss,
    data: Data,
    found: Gradients,
    result: Result,
    options: StageOptions,
    generator: torch.Generator,
) -> Result:
    """The stage's result after its steps on the support."""
    steps = options.steps
    wanted = steps.count * steps.batch
    fresh = draw(data, min(wanted, samples(data[0])) if is_pair(data) else wanted, generator)
    batches = in_batches(as_loader(fresh), steps.count, steps.batch)
    step_on_support(model, loss, batches, found, result.support, options.ridge, steps.sizes, steps.autocast)
    return replace(result, weights=found.layout.flatten(model).cpu())


def inputs_of(data: Data) -> Iterable[Tree]:
    """Batches of the inputs without the targets."""
    return (pair_of(batch)[0] for batch in as_loader(data))


def prune_once(
    A: Tensor,
    w_bar: Tensor,
    quota: Quota,
    options: StageOptions,
    mine: Tensor | None = None,
    watch: Watch = unwatched,
) -> Result:
    """One stage on given gradients; the quota is over the weights that `mine`, bool [p], names (None: over all)."""
    dead = dead_columns(A) if options.drop_dead else torch.zeros(A.shape[1], dtype=torch.bool)
    if mine is not None:
        dead, quota = dead & mine, quota.among(mine)
    aim = torch.where(dead, torch.zeros((), dtype=w_bar.dtype), w_bar)
    problem = Problem.of(A, None, aim, options.ridge)
    if options.first_order:  # b = Aw̄ − e/m, given as the residual itself
        problem = replace(problem, residual=problem.residual - 1.0 / options.batch)
    return solve(problem, quota, options.solver, watch=watch)


def _any_trainable(prunable: Predicate) -> Predicate:
    return lambda name, module, parameter: parameter.requires_grad or prunable(name, module, parameter)


def draw(data: Data, count: int, generator: torch.Generator) -> Data:
    """`count` samples: fresh ones of a pair (inputs, targets); a loader is passed on and shuffles by itself."""
    if not is_pair(data):
        return data
    inputs, targets = pair_of(data)
    if samples(inputs) < count:
        raise ValueError(f"a stage needs n · batch = {count} samples, but the data has {samples(inputs)}")
    index = torch.randperm(samples(inputs), generator=generator)[:count]
    return mapped(lambda t: t[index], inputs), mapped(lambda t: t[index], targets)


def _repeats(data: Data) -> bool:
    """Whether a loader is known not to shuffle."""
    if is_pair(data):
        return False
    return isinstance(data, list) or isinstance(getattr(data, "sampler", None), SequentialSampler)


def _fraction(keep: float | Callable[[WeightLayout, float], Quota]) -> float:
    if callable(keep):
        raise ValueError("with a pattern instead of a fraction, give the densities as `path`")
    return keep
