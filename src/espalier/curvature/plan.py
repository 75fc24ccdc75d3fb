"""Which method computes the rows of A, checked on the first of them against autograd, and how many rows at once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from espalier.curvature.batches import Tree, apply, mapped
from espalier.curvature.explain import explanation, first_line
from espalier.curvature.layout import WeightLayout
from espalier.curvature.memory import PeakBytes, sample_bytes, spelled
from espalier.curvature.options import GradientOptions
from espalier.curvature.per_layer import covers, rows_by_layer, uncovered
from espalier.curvature.rows import Loss, Rows, rows_by_loop, rows_by_vmap

PROBE = 4  # rows that the check may look at: two, and two more where these leave doubts
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative, of a tensor's part of a row; 0.1 for 16 bits
_DOUBTFUL = 0.05  # up to here a rounded activation on the other side of a kink may be the cause
_SLACK = 2  # what kernels and the allocator take besides tensors: measured up to 1.7 times as much in all
_METHODS: dict[str, Rows] = {"layers": rows_by_layer, "vmap": rows_by_vmap, "loop": rows_by_loop}

_TOLD: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """How the rows are computed, and how many of them at once."""

    rows: int
    compute: Rows
    method: str


@dataclass(frozen=True)
class Probe:
    """The first few mini-batches, on which a method is tried.

    `inputs` and `targets` hold `rows` mini-batches of `batch` samples, one after the other.
    """

    model: nn.Module
    loss: Loss
    layout: WeightLayout
    inputs: Tree
    targets: Tree
    rows: int
    batch: int

    def some(self, start: int, count: int) -> tuple[Tree, Tree]:
        """The samples start … start + count."""
        return mapped(lambda t: t[start : start + count], (self.inputs, self.targets))

    def explained(self, inputs: Tree, targets: Tree) -> None:
        """ValueError where the model or the loss cannot take these."""
        why = explanation(self.model, self.loss, inputs, targets)
        if why is not None:
            raise ValueError(why)


def make_plan(probe: Probe, options: GradientOptions) -> Plan:
    """The method asked for, or under "auto" the fastest, once it gives the rows that autograd gives.

    ValueError where the method asked for does not, or the model or loss cannot take the data; a warning where "auto"
    had to take a slower one.
    """
    limit, layout, batch = options.memory_limit, probe.layout, probe.batch
    per_sample = _sample_bytes(probe)
    rejected: list[str] = []
    for method in _candidates(probe, options, crowded=batch * per_sample > limit):
        if method == "loop":
            room = max(0, limit - 12 * layout.numel) // per_sample
            plan, why = _loop(probe, max(1, min(batch, room)), batch * per_sample + 12 * layout.numel), None
        else:
            fitting = limit // (12 * layout.numel + batch * per_sample)
            plan, why = _chunked(probe, method, limit, min(probe.rows, 2 if fitting > 1 else 1))
        if why is None:
            if rejected:
                _tell(probe.model, f"gradients by method='{method}' instead: {'; '.join(rejected)}")
            return plan
        if options.method != "auto":
            raise ValueError(f"method='{method}' {why}. Use method='auto', or 'loop', which takes any model and loss")
        rejected.append(f"'{method}' {why}")
    raise AssertionError("the loop takes every model")


def _tell(model: nn.Module, text: str) -> None:
    """Warn once per model, however many stages take its gradients."""
    told = _TOLD.setdefault(model, set())
    if text not in told:
        told.add(text)
        warnings.warn(text, stacklevel=5)


def _sample_bytes(probe: Probe) -> int:
    for count in (1, probe.batch):  # some models take no single sample: statistics over the batch
        try:
            return max(1, sample_bytes(probe.model, probe.some(0, count)[0]) // count)
        except Exception:
            if count == probe.batch:
                probe.explained(*probe.some(0, count))
                raise
    raise AssertionError("one of both counts returns or raises")


def _candidates(probe: Probe, options: GradientOptions, crowded: bool) -> list[str]:
    if options.method == "layers" and (names := uncovered(probe.model, probe.layout)):
        raise ValueError(
            f"method='layers' cannot multiply out {', '.join(names)}: it takes the weights of nn.Linear, and of "
            "nn.Conv2d padded with zeros by a number. Use method='auto', or leave them out with `prunable`"
        )
    if options.method != "auto":
        return [options.method]
    convolutional = any(len(shape) > 2 for shape in probe.layout.shapes)
    # a row that averages many images is one ordinary backward pass, which multiplies them out faster
    if (convolutional and probe.batch >= 8) or (probe.batch > 1 and crowded):
        return ["loop"]
    known = covers(probe.model, probe.layout)
    if convolutional:
        return ["vmap", *(["layers"] if known else []), "loop"]
    return [*(["layers"] if known else []), "vmap", "loop"]


def _loop(probe: Probe, together: int, needed: int) -> Plan:
    """One backward pass per row, or several of parts of it, where the loss is a mean of theirs."""
    if together < probe.batch:
        size = min(together, probe.batch // 2)
        x, y = probe.some(0, 2 * size)
        found, true = _tried(probe, partial(rows_by_loop, together=size), x, y, 1), _truth(probe, x, y, 1)
        if isinstance(found, str) or _deviation(probe.layout, found, true)[0] > _tolerance(true[0]):
            raise ValueError(
                f"the loss is not a mean over samples, or the model mixes them: a row of {probe.batch} samples cannot "
                f"be added up from parts of {together}. Raise memory_limit to about {spelled(needed)}, or lower batch"
            )
        return Plan(1, partial(rows_by_loop, together=together), "loop")
    return Plan(1, rows_by_loop, "loop")


def _chunked(probe: Probe, method: str, limit: int, rows: int) -> tuple[Plan, str | None]:
    """The plan for as many rows at once as fit, by what the first `rows` take; and why it is not to be trusted."""
    x, y = probe.some(0, rows * probe.batch)
    with PeakBytes() as peak:
        found = _tried(probe, _METHODS[method], x, y, rows)
    why = found if isinstance(found, str) else _doubt(probe, _METHODS[method], found, rows)
    # Chunks beyond the processor's caches were measured slower.
    most = (32 if any(len(shape) > 2 for shape in probe.layout.shapes) else 1024) // probe.batch
    fitting = limit * rows // max(1, _SLACK * peak.bytes)
    return Plan(max(1, min(fitting, most)), _METHODS[method], method), why


def _doubt(probe: Probe, compute: Rows, found: list[Tensor], rows: int) -> str | None:
    """Why the method that found these first rows is not to be trusted; None where they are those of autograd."""
    x, y = probe.some(0, rows * probe.batch)
    if (name := _read_by_loss(probe, x, y)) is not None:
        return f"cannot see that the loss reads {name} besides the model's output"
    true = _truth(probe, x, y, rows)
    tolerance = _tolerance(true[0])
    worst, name = _deviation(probe.layout, found, true)
    if tolerance < worst < _DOUBTFUL and probe.rows >= 2 * rows:
        x, y = probe.some(rows * probe.batch, rows * probe.batch)
        again = _tried(probe, compute, x, y, rows)
        if isinstance(again, str):
            return again
        worst, name = _deviation(probe.layout, again, _truth(probe, x, y, rows))
    if worst > tolerance:
        return (
            f"gives other gradients than autograd, most of all of {name}: the model "
            "mixes samples or uses the weight outside its layer, or the loss is no mean over samples"
        )
    return None


def _tried(probe: Probe, compute: Rows, x: Tree, y: Tree, rows: int) -> list[Tensor] | str:
    try:
        return compute(probe.model, probe.loss, probe.layout, x, y, rows)[0]
    except Exception as error:
        probe.explained(x, y)
        return f"cannot take this model and loss ({first_line(error)})"


def _truth(probe: Probe, x: Tree, y: Tree, rows: int) -> list[Tensor]:
    """The definition: each row by a backward pass of its own."""
    try:
        return rows_by_loop(probe.model, probe.loss, probe.layout, x, y, rows)[0]
    except Exception:
        probe.explained(x, y)
        raise


def _read_by_loss(probe: Probe, x: Tree, y: Tree) -> str | None:
    """A prunable tensor that the loss reads by itself."""
    with torch.no_grad():
        output = apply(probe.model, x)
    value = probe.loss(output, y)
    if not value.requires_grad:
        return None
    parameters = dict(probe.model.named_parameters())
    wanted = [parameters[name] for name in probe.layout.names]
    grads = torch.autograd.grad(value, wanted, allow_unused=True)
    return next((name for name, g in zip(probe.layout.names, grads, strict=True) if g is not None), None)


def _deviation(layout: WeightLayout, found: list[Tensor], true: list[Tensor]) -> tuple[float, str]:
    """The largest relative deviation of a tensor's part of a row, and the tensor; 0 where the truth is not finite."""
    rows = true[0].shape[0]
    norms = torch.stack([t.reshape(rows, -1).double().norm(dim=1) for t in true])
    if not bool(torch.isfinite(norms).all()):
        return 0.0, ""
    errors = torch.stack(
        [(f.reshape(rows, -1) - t.reshape(rows, -1)).double().norm(dim=1) for f, t in zip(found, true, strict=True)]
    )
    # a tensor whose gradient cancels out has nothing but rounding: it is judged by the whole row
    relative = errors / (norms + norms.norm(dim=0) / 300).clamp_min(torch.finfo(torch.float64).tiny)
    worst = relative.nan_to_num(torch.inf, torch.inf).amax(dim=1)
    return float(worst.max()), layout.names[int(worst.argmax())]


def _tolerance(like: Tensor) -> float:
    known = _TOLERANCE.get(like.dtype, 0.1)
    return known if like.device.type == "cpu" or like.dtype != torch.float32 else 1e-2  # TF32
