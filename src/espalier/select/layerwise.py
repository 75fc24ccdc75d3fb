"""One-shot pruning of a network's layers from calibration data, given which layer feeds which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.curvature.moments import Moments, call, collect, collect_paired, input_columns
from espalier.curvature.watch import Watch, unwatched
from espalier.modes import evaluating
from espalier.select.allocate import allocate, mac_cost
from espalier.select.auxiliary import AuxiliaryOptions, auxiliary, auxiliary_layers
from espalier.select.backward import backward, backward_path
from espalier.select.gfs import gfs
from espalier.select.ispasp import ispasp
from espalier.select.omp import omp, omp_path
from espalier.select.refit import RIDGE, Path, Reconstruction, Selection, from_moments

Selector = Callable[[Reconstruction, int], Selection]

SELECTORS: dict[str, Selector] = {
    "omp": omp,
    "backward": backward,
    "ispasp": ispasp,
    "ispasp-refit": lambda problem, size: ispasp(problem, size, importance="norm", refitted=True),
    "auxiliary": auxiliary,
    "auxiliary-pcg": lambda problem, size: auxiliary(problem, size, AuxiliaryOptions(solver="pcg")),
    "auxiliary-exact": lambda problem, size: auxiliary(problem, size, AuxiliaryOptions(solver="exact")),
    "auxiliary-together": auxiliary,  # of one layer; of several, see prune_together
    "gfs": gfs,
}
PATHS: dict[str, Callable[[Reconstruction], Path]] = {"omp": omp_path, "backward": backward_path}


@dataclass(frozen=True)
class Pair:
    """Layers whose units go together, by dotted module names.

    `producers` write the units (one layer; or gate and up of a gated MLP; or q, k and v) and `consumers`
    read them. `via` are the per-channel layers between (batch norms, depthwise convolutions), `norm` the
    batch norm after a single consumer, folded into what counts as error. `units` is the number of units
    where it is not the producer's output channels (heads; key/value groups); `fused` is into how many equal
    parts a producer's output divides (3 for one qkv layer); `attributes` are dotted names of integers to
    scale with the units kept (numbers of heads).
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    via: tuple[str, ...] = ()
    norm: str | None = None
    units: int | None = None
    fused: int = 1
    attributes: tuple[str, ...] = ()

    def count(self, model: nn.Module) -> int:
        """Number of units."""
        return self.units or _weight(model, self.producers[0]).shape[0] // self.fused

    def block(self, model: nn.Module) -> int:
        """Consumer columns per unit."""
        columns, units = input_columns(model.get_submodule(self.consumers[0])), self.count(model)
        if columns % units:
            raise ValueError(
                f"{self.consumers[0]} reads {columns} columns, which do not divide into the {units} "
                f"units of {self.producers[0]}: set `units`, or pair other layers"
            )
        return columns // units


@dataclass(frozen=True)
class LayerResult:
    """One pair's outcome: `selection` in the consumer's own units, stacked over consumers row by row."""

    pair: Pair
    units: int
    block: int
    selection: Selection


def prune_layers(
    model: nn.Module,
    pairs: Sequence[Pair],
    data: Iterable[Any],
    *,
    sizes: Sequence[int] | None = None,
    macs: float | None = None,
    method: str | Selector = "omp",
    sequential: bool = True,
    ridge: float = RIDGE,
    multiple: int = 1,
    moments: Mapping[str, Moments] | None = None,
    watch: Watch = unwatched,
) -> list[LayerResult]:
    """Choose and refit the units of every pair, from unlabelled calibration batches.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> found = prune_layers(model, [Pair(("0",), ("2",))], [torch.rand(64, 4)], sizes=[6])
    >>> narrow(model, found)[0].out_features
    6

    `pairs` in the order of the forward pass; `data` is iterated once for all layers and, with `sequential`,
    once more per pair, so that each layer is corrected for the error that earlier ones made (needs data
    that can be iterated again and gives the same samples, such as a list or a DataLoader). Either `sizes`
    (units kept per pair) or `macs`: the fraction of the model's multiply-adds (of its Linear and Conv2d
    layers) to keep, divided among the pairs by marginal relative error. `moments` are those of the consumers'
    dense inputs on the same data, where they are already known. `watch` shows progress over the passes. The model is
    not changed. Raises ValueError for wrong pairs, sizes or data.
    """
    if (sizes is None) == (macs is None):
        raise ValueError("give either sizes (units to keep per pair) or macs (a fraction of the model's to keep)")
    if isinstance(method, str) and method not in SELECTORS:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(sorted(SELECTORS))}")
    batches = list(data) if hasattr(data, "__next__") else data  # passes are repeated
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("the calibration loader is empty: at least one batch is needed")
    check_pairs(model, pairs, first)
    if moments is None:
        moments = collect(model, [pair.consumers[0] for pair in pairs], batches, watch=watch)
    problems = [problem_of(model, pair, moments[pair.consumers[0]], ridge) for pair in pairs]
    if sizes is None:
        path = PATHS[method] if isinstance(method, str) and method in PATHS else omp_path
        curves = [relative_errors(problem, path) for problem in watch(problems, "errors of all sizes")]
        groups = [(pair.count(model), (*pair.producers, *pair.consumers, *pair.via)) for pair in pairs]
        cost = mac_cost(model, groups, first)
        full = cost([units for units, _ in groups])
        sizes = allocate(curves, cost, float(macs or 0.0) * full, multiple=multiple)
    if len(sizes) != len(pairs):
        raise ValueError(f"{len(pairs)} pairs but {len(sizes)} sizes")
    if method == "auxiliary-together":
        return prune_together(model, pairs, batches, sizes, ridge=ridge, watch=watch)
    select = SELECTORS[method] if isinstance(method, str) else method
    if not sequential:
        items = list(zip(pairs, problems, sizes, strict=True))
        return [_result(model, pair, p, size, select) for pair, p, size in watch(items, "choosing units")]
    student, results = copy.deepcopy(model), []
    for index, (pair, size) in enumerate(zip(pairs, sizes, strict=True)):
        problem = problems[index]
        if index:  # the first pair's inputs are still the dense ones
            paired = collect_paired(model, student, [pair.consumers[0]], batches, known=moments, watch=watch)
            problem = problem_of(model, pair, paired[pair.consumers[0]], ridge)
        for _ in watch((pair,), f"choosing {size} of {problem.units} units for {pair.consumers[0]}"):
            results.append(_result(model, pair, problem, size, select))
        write_back(student, results[-1])
    return results


def prune_together(
    model: nn.Module,
    pairs: Sequence[Pair],
    data: Iterable[Any],
    sizes: Sequence[int],
    options: AuxiliaryOptions | None = None,
    *,
    ridge: float = RIDGE,
    watch: Watch = unwatched,
) -> list[LayerResult]:
    """The five-step variant on all pairs at once, each iteration on the network as pruned so far.

    `data` is iterated 1 + T times. See `espalier.select.auxiliary.auxiliary_layers`.
    """
    names = [pair.consumers[0] for pair in pairs]
    scales = [_scale(model, pair) for pair in pairs]

    def problems(weights: Sequence[Tensor] | None) -> list[Reconstruction]:
        if weights is None:
            found = collect(model, names, data, watch=watch)
        else:
            student = copy.deepcopy(model)
            for pair, scale, weight in zip(pairs, scales, weights, strict=True):
                _store(student, pair, weight / scale[:, None], None)
            found = collect_paired(model, student, names, data, watch=watch)
        return [problem_of(model, pair, found[name], ridge) for pair, name in zip(pairs, names, strict=True)]

    selections = auxiliary_layers(problems, sizes, options)
    return [
        LayerResult(pair, pair.count(model), pair.block(model), _unscaled(selection, scale))
        for pair, scale, selection in zip(pairs, scales, selections, strict=True)
    ]


def check_pairs(model: nn.Module, pairs: Sequence[Pair], example: Any) -> None:
    """Refuse pairs whose consumers do not exist, do not read the producers, or are not the only readers.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> check_pairs(model, [Pair(("0",), ("2",))], torch.rand(3, 4))

    Runs `example` once per pair with the consumers' outputs cut off from the gradient: where the model's
    output still depends on a producer, some layer that the pair does not name reads it too.
    """
    for pair in pairs:
        pair.block(model)
        shapes = {(type(m), m.weight.shape[1:]) for m in map(model.get_submodule, pair.consumers)}  # type: ignore[union-attr]
        if len(shapes) > 1:
            raise ValueError(
                f"the consumers {', '.join(pair.consumers)} read their inputs in different ways; one "
                "refit needs consumers of the same kind and width"
            )
        made: dict[str, Tensor] = {}
        read: dict[str, Tensor] = {}

        def produce(name: str, made: dict[str, Tensor] = made) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                made[name] = output.detach().requires_grad_()
                return made[name].clone()  # so that in-place activations may follow

            return hook

        def consume(name: str, read: dict[str, Tensor] = read) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                read[name] = output
                return output.detach().clone()

            return hook

        handles = [model.get_submodule(n).register_forward_hook(produce(n)) for n in pair.producers]
        handles += [model.get_submodule(n).register_forward_hook(consume(n)) for n in pair.consumers]
        try:
            with torch.enable_grad(), evaluating(model):
                out = call(model, example)
        finally:
            for handle in handles:
                handle.remove()
        for name in (*pair.producers, *pair.consumers):
            if name not in made and name not in read:
                raise ValueError(f"the model's forward pass never calls {name}")
        for name, value in read.items():
            if not _depends(value, made.values()):
                raise ValueError(f"{name} does not read the output of {' / '.join(pair.producers)}")
        if any(_depends(value, made.values()) for value in _tensors(out)):
            raise ValueError(
                f"the output of {' / '.join(pair.producers)} is also read by a layer other than "
                f"{', '.join(pair.consumers)}: name all its consumers in one Pair, or leave it unpruned"
            )


@torch.no_grad()
def narrow(model: nn.Module, results: Sequence[LayerResult]) -> nn.Module:
    """A copy of the model with the removed units sliced away and the consumers' weights and biases refitted.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> small = narrow(model, prune_layers(model, [Pair(("0",), ("2",))], [torch.rand(64, 4)], sizes=[16]))
    >>> x = torch.rand(5, 4)
    >>> torch.allclose(small(x), model(x), atol=1e-5)
    True
    """
    small = copy.deepcopy(model)
    for result in results:
        write_back(small, result)
    for result in results:
        pair, support = result.pair, result.selection.support
        for name in (*pair.producers, *pair.via):
            _slice_outputs(small.get_submodule(name), support, result.units, pair.fused, name)
        for name in pair.consumers:
            module = small.get_submodule(name)
            weight = _weight(small, name)
            per_unit = weight.shape[1] // result.units
            index = _columns(support, per_unit).to(weight.device)
            module.weight = nn.Parameter(weight[:, index].clone())
            setattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels", len(index))
        for attribute in pair.attributes:
            owner, _, field = attribute.rpartition(".")
            old = getattr(small.get_submodule(owner), field)
            setattr(small.get_submodule(owner), field, old * len(support) // result.units)
    return small


def _result(model: nn.Module, pair: Pair, problem: Reconstruction, size: int, select: Selector) -> LayerResult:
    selection = _unscaled(select(problem, size), _scale(model, pair))
    return LayerResult(pair, problem.units, problem.block, selection)


def relative_errors(problem: Reconstruction, path: Callable[[Reconstruction], Path] = omp_path) -> Tensor:
    """The errors of a path [units + 1] as shares of the layer's output energy, which can be added up over layers."""
    return path(problem).errors / max(problem.energy, 1e-300)


def problem_of(model: nn.Module, pair: Pair, moments: Any, ridge: float) -> Reconstruction:
    """What the pair's consumer is to reproduce, from the moments of its input."""
    weight = torch.cat([_weight(model, name).flatten(1) for name in pair.consumers]).double()
    scale = _scale(model, pair).to(weight)
    return from_moments(moments, scale[:, None] * weight, block=pair.block(model), ridge=ridge)


def _scale(model: nn.Module, pair: Pair) -> Tensor:
    """Factor per consumer output by which the batch norm after it will multiply errors."""
    if pair.norm is None:
        rows = sum(_weight(model, name).shape[0] for name in pair.consumers)
        return torch.ones(rows, dtype=torch.float64)
    norm = model.get_submodule(pair.norm)
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_var is None:
        raise TypeError(f"{pair.norm} is a {type(norm).__name__}; only batch norms with statistics can be folded")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double().abs()
    return scale.clamp_min(1e-6 * float(scale.max()))


def _unscaled(selection: Selection, scale: Tensor) -> Selection:
    scale = scale.to(selection.weights)
    bias = None if selection.bias is None else selection.bias / scale
    weights = selection.weights / scale[:, None]
    return Selection(selection.support, weights, bias, selection.error, selection.energy)


@torch.no_grad()
def write_back(model: nn.Module, result: LayerResult) -> None:
    """Put a result into a model of the dense shape: removed columns become zero."""
    chosen = result.selection
    full = chosen.weights.new_zeros(len(chosen.weights), result.units * result.block)
    full[:, _columns(chosen.support, result.block)] = chosen.weights
    _store(model, result.pair, full, chosen.bias)


@torch.no_grad()
def _store(model: nn.Module, pair: Pair, full: Tensor, bias: Tensor | None) -> None:
    row = 0
    for name in pair.consumers:
        module, weight = model.get_submodule(name), _weight(model, name)
        rows = slice(row, row + weight.shape[0])
        row = rows.stop
        weight.copy_(full[rows].view_as(weight))
        if bias is None:
            continue
        change = bias[rows].to(weight)
        own = getattr(module, "bias", None)
        norm = model.get_submodule(pair.norm) if pair.norm else None
        if own is not None:
            own += change
        elif norm is not None:  # subtracted again by the norm: the same output, and no new parameter
            norm.running_mean -= change  # type: ignore[operator]
        else:
            module.bias = nn.Parameter(change)


def _slice_outputs(module: nn.Module, support: Tensor, units: int, fused: int, name: str) -> None:
    def cut(value: Tensor) -> Tensor:
        per_unit = value.shape[0] // (units * fused)
        parts = [_columns(support, per_unit) + part * units * per_unit for part in range(fused)]
        return value[torch.cat(parts).to(value.device)].clone()

    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        for field in ("running_mean", "running_var"):
            if getattr(module, field) is not None:
                setattr(module, field, cut(getattr(module, field)))
        width = "num_features"
    elif isinstance(module, nn.Linear):
        width = "out_features"
    elif isinstance(module, nn.Conv2d):
        width = "out_channels"
    else:
        raise TypeError(f"{name} is a {type(module).__name__}: only Linear, Conv2d and batch norms can be narrowed")
    for field in ("weight", "bias"):
        value = getattr(module, field, None)
        if value is not None:
            setattr(module, field, nn.Parameter(cut(value)))
            setattr(module, width, getattr(module, field).shape[0])
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        if module.groups != units:
            raise TypeError(f"{name} has {module.groups} groups for {units} units: only depthwise ones can be narrowed")
        module.groups = module.in_channels = len(support)


def _columns(units: Tensor, block: int) -> Tensor:
    return (units[:, None] * block + torch.arange(block, device=units.device)).flatten()


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = getattr(model.get_submodule(name), "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} is a {type(model.get_submodule(name)).__name__}, which has no weight")
    return weight


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _depends(value: Tensor, sources: Iterable[Tensor]) -> bool:
    if not value.requires_grad:
        return False
    grads = torch.autograd.grad(value.sum(), list(sources), allow_unused=True, retain_graph=True)
    return any(grad is not None for grad in grads)
