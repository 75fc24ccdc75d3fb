"""Rows of A by automatic differentiation: one backward pass per row, or all of a chunk's rows at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from espalier.curvature.batches import Tree, apply, arguments, mapped, samples
from espalier.curvature.layout import WeightLayout

Loss = Callable[[Tensor, Tensor], Tensor]
Rows = Callable[[nn.Module, Loss, WeightLayout, Tree, Tree, int], tuple[list[Tensor], Tensor]]
"""From (model, loss, layout, inputs, targets, rows), the mini-batches one after the other and all of one size, to the
rows' gradients, per tensor of the layout [rows, …], and the mean of the rows' losses."""


def by_row(tree: Tree, rows: int) -> Tree:
    """Tensors [rows · m, …] as [rows, m, …].

    >>> by_row(torch.ones(6, 2), 3).shape
    torch.Size([3, 2, 2])
    """
    return mapped(lambda t: t.contiguous().reshape(rows, -1, *t.shape[1:]), tree)


def rows_by_vmap(
    model: nn.Module, loss: Loss, layout: WeightLayout, inputs: Tree, targets: Tree, rows: int
) -> tuple[list[Tensor], Tensor]:
    """All rows in one vectorised pass by `torch.func`."""
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    wanted = {name: state[name] for name in layout.names}

    def value(weights: dict[str, Tensor], x: Tree, y: Tree) -> Tensor:
        return loss(torch.func.functional_call(model, {**state, **weights}, *arguments(x)), y)

    with warnings.catch_warnings():
        # of operators without a batching rule: nothing that the caller could change
        warnings.filterwarnings("ignore", message="There is a performance drop")
        each = torch.func.vmap(torch.func.grad_and_value(value), in_dims=(None, 0, 0))
        grads, values = each(wanted, by_row(inputs, rows), by_row(targets, rows))
    return [grads[name] for name in layout.names], values.mean()


def rows_by_loop(
    model: nn.Module,
    loss: Loss,
    layout: WeightLayout,
    inputs: Tree,
    targets: Tree,
    rows: int,
    together: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """One backward pass per row, which is the definition; or several where only so many samples fit `together`."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in layout.names]
    batch = samples(inputs) // rows
    size, total = together or batch, 0.0
    out = [p.new_zeros((rows, *p.shape)) for p in wanted]
    for row in range(rows):
        for start in range(row * batch, (row + 1) * batch, size):
            stop = min(start + size, (row + 1) * batch)
            x, y = mapped(lambda t, start=start, stop=stop: t[start:stop], (inputs, targets))
            value = loss(apply(model, x), y)
            grads = torch.autograd.grad(value, wanted, allow_unused=True)
            for whole, grad in zip(out, grads, strict=True):
                if grad is not None:
                    whole[row].add_(grad, alpha=(stop - start) / batch)
            total += float(value.detach()) * (stop - start) / batch
    return out, torch.tensor(total / rows)
