"""The matrix A of mini-batch gradients, from which all curvature here is built."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from espalier.curvature.layout import Predicate, WeightLayout, convolution_and_linear
from espalier.curvature.memory import check_room
from espalier.curvature.per_layer import Loss, covers, rows_by_layer

Method = Literal["auto", "layers", "vmap", "loop"]


@dataclass(frozen=True)
class GradientOptions:
    """How gradients are computed and kept.

    memory_limit: bytes that the working memory of one chunk may take (A itself is accounted for apart).
    dtype: storage of A: float32, bfloat16 (half the bytes read per solve), or float64 (tests).
    path: file for a memory-mapped A; None keeps it in memory.
    method: "layers" (per-layer products), "vmap", "loop" (one backward per row), or "auto".
    progress: show a bar and say the cost before the start.
    """

    memory_limit: int = 1 << 30
    dtype: torch.dtype = torch.float32
    path: str | Path | None = None
    method: Method = "auto"
    progress: bool = False


@dataclass(frozen=True)
class Gradients:
    """A [n, p], the weights w̄ [p] at which it was taken, and the layout of the p weights.

    `batch` is the number of samples averaged in each row; `mean_loss` the mean loss over all of them.
    Under torch.distributed each rank holds `first_row` onwards of the `total_rows` rows.
    """

    A: Tensor
    w_bar: Tensor
    layout: WeightLayout
    batch: int
    mean_loss: float
    first_row: int = 0
    total_rows: int = 0


def gradients(
    model: nn.Module,
    loss: Loss,
    data: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor],
    n: int,
    batch: int = 1,
    prunable: Predicate = convolution_and_linear,
    options: GradientOptions | None = None,
) -> Gradients:
    """Gradients of the mean loss over n mini-batches of `batch` samples each.

    >>> model = nn.Linear(3, 2, bias=False).eval()
    >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
    >>> gradients(model, nn.functional.cross_entropy, (x, y), n=4, batch=2).A.shape
    torch.Size([4, 6])

    `data` is a loader of (inputs, targets), or one such pair of tensors; its first n · batch samples are
    used in order, so shuffle it to draw other ones. `loss(output, target)` must be a mean over samples.
    The model must be in eval mode: batch norm is frozen, as in A = [∇l₁(w̄), …, ∇lₙ(w̄)]ᵀ of the paper.
    Raises ValueError for a model in training mode, tied or frozen weights, n < 1, too little data or a
    gradient that is not finite, MemoryError (before anything is allocated) where A does not fit.
    """
    options = options or GradientOptions()
    if n < 1 or batch < 1:
        raise ValueError(f"n = {n} mini-batches of {batch} samples: both must be at least 1")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"the model is in training mode ({training[0]}): per-sample gradients need frozen batch norm "
            "and no dropout. Call model.eval() first."
        )
    layout = WeightLayout.of(model, prunable)
    first, last = _rank_rows(n)
    check_room(last - first, layout.numel, options)
    A = _storage(last - first, layout.numel, options)
    method = _method(model, layout, options.method, batch)
    step = _rows_per_chunk(layout, batch, method, options.memory_limit)
    total, done = 0.0, 0
    chunks = _mini_batches(data, first * batch, (last - first) * batch, step * batch)
    for inputs, targets in _with_progress(chunks, last - first, batch, layout.numel, options.progress):
        rows = inputs.shape[0] // batch
        values, mean = _ROWS[method](model, loss, layout, inputs, targets, rows)
        if not bool(torch.isfinite(values.sum())):  # one pass; a mask of all values would take three
            for bad in (~torch.isfinite(values)).any(dim=1).nonzero().flatten().tolist()[:1]:
                raise ValueError(
                    f"the gradient of mini-batch {bad + first + done} is not finite: the loss overflows on it"
                )
        A[done : done + rows] = values.to(A.dtype)
        done, total = done + rows, total + float(mean) * rows
    return Gradients(A, layout.flatten(model), layout, batch, total / max(done, 1), first, n)


def _rank_rows(n: int) -> tuple[int, int]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, n
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return rank * n // world, (rank + 1) * n // world


def _storage(rows: int, p: int, options: GradientOptions) -> Tensor:
    if options.path is None:
        return torch.empty(rows, p, dtype=options.dtype)
    # NumPy has no bfloat16: its bits are stored as int16 and viewed
    kinds = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16}
    disk = np.memmap(os.fspath(options.path), dtype=kinds[options.dtype], mode="w+", shape=(rows, p))
    return torch.from_numpy(disk).view(options.dtype)


def _method(model: nn.Module, layout: WeightLayout, wanted: Method, batch: int) -> str:
    if wanted != "auto":
        return wanted
    if not covers(model, layout):
        return "vmap"
    # A row that averages many images is one ordinary backward pass, which multiplies convolutions out faster
    convolutional = any(len(shape) > 2 for shape in layout.shapes)
    return "loop" if convolutional and batch >= 8 else "layers"


def _rows_per_chunk(layout: WeightLayout, batch: int, method: str, limit: int) -> int:
    if method == "loop":
        return 1
    # Room for the p gradients of a row a few times over, and about 2 MiB of activations per image.
    # Larger chunks than these do not fit the processor's caches and were measured to be slower.
    convolutional = any(len(shape) > 2 for shape in layout.shapes)
    per_row = 12 * layout.numel + batch * (2 << 20 if convolutional else 1 << 16)
    return max(1, min(limit // per_row, (32 if convolutional else 1024) // batch))


def _mini_batches(
    data: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor], skip: int, count: int, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the samples skip … skip + count of the data into pairs of at most `step` samples."""
    pairs = cast(Iterable[tuple[Tensor, Tensor]], [data] if _is_pair(data) else data)
    waiting: list[tuple[Tensor, Tensor]] = []
    held = 0
    for inputs, targets in pairs:
        if inputs.shape[0] != targets.shape[0]:
            raise ValueError(f"the loader gives {inputs.shape[0]} inputs with {targets.shape[0]} targets")
        if skip >= inputs.shape[0]:
            skip -= inputs.shape[0]
            continue
        if skip:
            inputs, targets, skip = inputs[skip:], targets[skip:], 0
        waiting.append((inputs, targets))
        held += inputs.shape[0]
        while held >= step or (0 < count <= held):
            x, y = waiting[0]
            if len(waiting) > 1:
                x, y = torch.cat([pair[0] for pair in waiting]), torch.cat([pair[1] for pair in waiting])
            take = min(step, count)
            yield x[:take], y[:take]
            count, held, waiting = count - take, x.shape[0] - take, [(x[take:], y[take:])]
            if count == 0:
                return
    raise ValueError(f"the data ended {count - held} samples too early: give more data, or lower n or batch")


def _is_pair(data: object) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)


def _with_progress(
    chunks: Iterator[tuple[Tensor, Tensor]], rows: int, batch: int, p: int, shown: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    if not shown:
        yield from chunks
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        bar.console.print(f"gradients: {rows} rows × {p:,} weights, {rows * batch:,} samples forward and backward")
        task = bar.add_task("gradients", total=rows * batch)
        for inputs, targets in chunks:
            yield inputs, targets
            bar.advance(task, inputs.shape[0])


def _rows_by_vmap(
    model: nn.Module, loss: Loss, layout: WeightLayout, inputs: Tensor, targets: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    state = {name: p.detach() for name, p in model.named_parameters()}
    wanted = {name: state[name] for name in layout.names}

    def value(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, {**state, **weights}, (x,)), y)

    x = inputs.reshape(rows, -1, *inputs.shape[1:])
    y = targets.reshape(rows, -1, *targets.shape[1:])
    try:
        grads, values = torch.func.vmap(torch.func.grad_and_value(value), in_dims=(None, 0, 0))(wanted, x, y)
    except RuntimeError as error:
        warnings.warn(f"vmap cannot take this model, one backward pass per row instead: {error}", stacklevel=3)
        return _rows_by_loop(model, loss, layout, inputs, targets, rows)
    return torch.cat([grads[name].reshape(rows, -1) for name in layout.names], dim=1), values.mean()


def _rows_by_loop(
    model: nn.Module, loss: Loss, layout: WeightLayout, inputs: Tensor, targets: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in layout.names]
    out, total = [], 0.0
    for x, y in zip(inputs.chunk(rows), targets.chunk(rows), strict=True):
        value = loss(model(x), y)
        out.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, wanted)]))
        total += float(value.detach())
    return torch.stack(out), torch.tensor(total / rows)


_ROWS = {"layers": rows_by_layer, "vmap": _rows_by_vmap, "loop": _rows_by_loop}
