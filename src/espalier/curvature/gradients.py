"""The matrix A of mini-batch gradients, from which all curvature here is built."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor, nn

from espalier.curvature import ranks
from espalier.curvature.layout import Predicate, WeightLayout, convolution_and_linear
from espalier.curvature.memory import check_room, sample_bytes
from espalier.curvature.per_layer import Loss, covers, rows_by_layer

Method = Literal["auto", "layers", "vmap", "loop"]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GradientOptions:
    """How gradients are computed and kept.

    memory_limit: bytes that the working memory of one chunk may take, though never less than one sample's (A
    itself is accounted for apart). A row that averages more samples than fit is added up from parts.
    dtype: storage of A: float32, bfloat16 (half the bytes read per solve), or float64 (tests).
    path: file for a memory-mapped A; None keeps it in memory. It appears under this name once it is complete.
    method: "layers" (per-layer products), "vmap", "loop" (one backward per row), or "auto".
    progress: say the cost before the start and show a bar; None: where standard error is a terminal.
    """

    memory_limit: int = 1 << 30
    dtype: torch.dtype = torch.float32
    path: str | Path | None = None
    method: Method = "auto"
    progress: bool | None = None


@dataclass(frozen=True)
class Gradients:
    """A [n, p], the weights w̄ [p] at which it was taken, and the layout of the p weights.

    `batch` is the number of samples averaged in each row; `mean_loss` the mean loss over all of them.
    Under torch.distributed each rank computes `first_row` onwards of the `total_rows` rows; with a path, A is the one
    file that all ranks of the machine write, and holds all rows.
    """

    A: Tensor
    w_bar: Tensor
    layout: WeightLayout
    batch: int
    mean_loss: float
    first_row: int = 0
    total_rows: int = 0

    def gathered(self) -> Gradients:
        """All rows on every rank; itself where it has them already. MemoryError, before, where they do not fit.

        >>> found = gradients(nn.Linear(3, 2).eval(), nn.functional.mse_loss, (torch.ones(4, 3), torch.ones(4, 2)), 4)
        >>> found.gathered() is found
        True
        """
        if self.A.shape[0] == self.total_rows:
            return self
        check_room(self.total_rows, self.A.shape[1], GradientOptions(0, self.A.dtype))
        return replace(self, A=ranks.gather(self.A, self.total_rows), first_row=0)


def gradients(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Pair] | Pair,
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
    check_room(last - first if options.path is None else n, layout.numel, options)
    pairs = iter(as_loader(data))
    head = next(pairs, None)
    if head is None or len(head) != 2:
        raise ValueError("the data is empty" if head is None else f"a batch has {len(head)} parts: (inputs, targets)")
    device = next(model.parameters()).device
    plan = _plan(model, layout, options, batch, head[0][:1].to(device))
    parts = mini_batches(chain([head], pairs), first * batch, (last - first) * batch, plan.rows * batch)
    rows_done, total = 0, 0.0
    with _storage(n, first, last, layout.numel, options) as (A, own):
        for inputs, targets in _with_progress(parts, last - first, batch, layout.numel, options):
            rows = inputs.shape[0] // batch
            values, mean = plan.compute(model, loss, layout, inputs.to(device), targets.to(device), rows)
            if not bool(torch.isfinite(values.sum())):  # one pass; a mask of all values would take three
                for bad in (~torch.isfinite(values)).any(dim=1).nonzero().flatten().tolist()[:1]:
                    raise ValueError(
                        f"the gradient of mini-batch {bad + first + rows_done} is not finite: the loss overflows on it"
                    )
            own[rows_done : rows_done + rows] = values.to(A.dtype)
            rows_done, total = rows_done + rows, total + float(mean) * rows
        _name_untouched(own, layout)
    average = ranks.mean(total, rows_done)
    return Gradients(A, layout.flatten(model).cpu(), layout, batch, average, 0 if A.shape[0] == n else first, n)


def _name_untouched(A: Tensor, layout: WeightLayout) -> None:
    """Say which whole tensors get no gradient: nothing in A tells what they are worth."""
    untouched, start = [], 0
    for name, size in zip(layout.names, layout.sizes, strict=True):
        block = A[:, start : start + size]
        if not bool(block[:1].any()) and not bool(block.any()):
            untouched.append(name)
        start += size
    if untouched:
        warnings.warn(
            f"no gradient reaches {', '.join(untouched)}: not used in the forward pass, or dead. Their columns of A "
            "are zero; leave them out with a `prunable` predicate if they are to stay.",
            stacklevel=3,
        )


def _rank_rows(n: int) -> tuple[int, int]:
    return ranks.rows_of(n, *ranks.world())


@contextmanager
def _storage(n: int, first: int, last: int, p: int, options: GradientOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """A and this rank's rows of it: in memory the same, on disk one file for all ranks of the machine."""
    if options.path is None:
        A = torch.empty(last - first, p, dtype=options.dtype)
        yield A, A
        return
    path, part = Path(options.path), Path(f"{os.fspath(options.path)}.part")
    # NumPy has no bfloat16: its bits are stored as int16 and viewed
    kind = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16}[options.dtype]

    def mapped(mode: Literal["w+", "r+"]) -> Tensor:
        return torch.from_numpy(np.memmap(part, dtype=kind, mode=mode, shape=(n, p))).view(options.dtype)

    try:
        A = ranks.in_turn(lambda: mapped("w+"), lambda: mapped("r+"))
        yield A, A[first:last]
        ranks.meet()
        if ranks.world()[0] == 0:
            os.replace(part, path)  # the map stays with the file
        ranks.meet()
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _Plan:
    """How the rows are computed, and how many of them at once."""

    rows: int
    compute: Callable[[nn.Module, Loss, WeightLayout, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _plan(model: nn.Module, layout: WeightLayout, options: GradientOptions, batch: int, sample: Tensor) -> _Plan:
    method, limit = _method(model, layout, options.method, batch), options.memory_limit
    per_sample = max(1, sample_bytes(model, sample))
    if options.method == "auto" and batch > 1 and batch * per_sample > limit:
        method = "loop"
    if method == "loop":
        return _Plan(1, partial(_rows_by_loop, together=max(1, min(batch, limit // per_sample))))
    # Room for the p gradients of a row a few times over. Chunks beyond the processor's caches were measured slower.
    convolutional = any(len(shape) > 2 for shape in layout.shapes)
    fitting = limit // (12 * layout.numel + batch * per_sample)
    rows = max(1, min(fitting, (32 if convolutional else 1024) // batch))
    return _Plan(rows, rows_by_layer if method == "layers" else _rows_by_vmap)


def _method(model: nn.Module, layout: WeightLayout, wanted: Method, batch: int) -> str:
    if wanted != "auto":
        return wanted
    convolutional = any(len(shape) > 2 for shape in layout.shapes)
    if convolutional:  # a row that averages many images is one ordinary backward pass, which multiplies them out faster
        return "loop" if batch >= 8 else "vmap"
    return "layers" if covers(model, layout) else "vmap"


def mini_batches(pairs: Iterable[Pair], skip: int, count: int, step: int) -> Iterator[Pair]:
    """Cut the samples skip … skip + count of the data into pairs of at most `step` samples."""
    waiting: list[Pair] = []
    held = 0
    for inputs, targets in pairs:
        if inputs.shape[0] != targets.shape[0]:
            raise ValueError(f"the loader gives {inputs.shape[0]} inputs with {targets.shape[0]} targets")
        if skip >= inputs.shape[0]:
            skip -= inputs.shape[0]
            continue
        if skip:
            inputs, targets, skip = inputs[skip:], targets[skip:], 0
        if waiting and inputs.shape[1:] != waiting[0][0].shape[1:]:
            shapes = tuple(waiting[0][0].shape[1:]), tuple(inputs.shape[1:])
            raise ValueError(f"the loader gives samples of shape {shapes[0]} and then of {shapes[1]}")
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


def is_pair(data: object) -> TypeGuard[Pair]:
    """Whether the data is one pair of tensors (inputs, targets) rather than a loader of such pairs."""
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)


def as_loader(data: Pair | Iterable[Pair]) -> Iterable[Pair]:
    """The data as a loader: one pair of tensors is a loader of one batch."""
    return [data] if is_pair(data) else cast(Iterable[Pair], data)


def _with_progress(parts: Iterator[Pair], rows: int, batch: int, p: int, options: GradientOptions) -> Iterator[Pair]:
    if not (sys.stderr.isatty() if options.progress is None else options.progress):
        yield from parts
        return
    from rich.console import Console
    from rich.progress import Progress

    size = rows * p * torch.empty(0, dtype=options.dtype).element_size() / 2**30
    where = "in memory" if options.path is None else f"in {os.fspath(options.path)}"
    with Progress(console=Console(stderr=True), transient=True) as bar:
        bar.console.print(
            f"gradients: {rows} rows × {p:,} weights, {size:.2f} GiB {where}; "
            f"{rows * batch:,} samples forward and backward"
        )
        task = bar.add_task("gradients", total=rows * batch)
        for inputs, targets in parts:
            yield inputs, targets
            bar.advance(task, inputs.shape[0])


def _rows_by_vmap(
    model: nn.Module, loss: Loss, layout: WeightLayout, inputs: Tensor, targets: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    wanted = {name: state[name] for name in layout.names}

    def value(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, {**state, **weights}, (x,)), y)

    x = inputs.contiguous().reshape(rows, -1, *inputs.shape[1:])
    y = targets.reshape(rows, -1, *targets.shape[1:])
    try:
        grads, values = torch.func.vmap(torch.func.grad_and_value(value), in_dims=(None, 0, 0))(wanted, x, y)
    except RuntimeError as error:
        by_layer = covers(model, layout)
        instead = "products layer by layer" if by_layer else "one backward pass per row"
        warnings.warn(f"vmap cannot take this model, {instead} instead: {error}", stacklevel=3)
        return (rows_by_layer if by_layer else _rows_by_loop)(model, loss, layout, inputs, targets, rows)
    return torch.cat([grads[name].reshape(rows, -1) for name in layout.names], dim=1), values.mean()


def _rows_by_loop(
    model: nn.Module,
    loss: Loss,
    layout: WeightLayout,
    inputs: Tensor,
    targets: Tensor,
    rows: int,
    together: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One backward pass per row, or several where only so many samples fit `together`."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in layout.names]
    out, total = [], 0.0
    for x, y in zip(inputs.chunk(rows), targets.chunk(rows), strict=True):
        size = together or len(x)
        row = torch.zeros(())
        for part, target in zip(x.split(size), y.split(size), strict=True):
            value = loss(model(part), target) * (len(part) / len(x))
            found = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
            row = row + torch.cat([g.reshape(-1) for g in found])
            total += float(value.detach())
        out.append(row)
    return torch.stack(out), torch.tensor(total / rows)
