"""Gradients of mini-batch losses from one backward pass, by per-layer products.

Row i of A is a sum, over the samples of mini-batch i, of what each sample adds to the weight's gradient.
For linear and convolution layers that is a product of the layer's input and the gradient at its output, so
the backward pass that finds the output gradients once is all the automatic differentiation needed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from espalier.curvature.batches import Tree, arguments, mapped, samples
from espalier.curvature.layout import WeightLayout
from espalier.curvature.rows import Loss as Loss
from espalier.curvature.rows import by_row


def uncovered(model: nn.Module, layout: WeightLayout) -> list[str]:
    """The prunable weights of layers that this path cannot multiply out, each with its kind of layer.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(1, 1, 1))
    >>> uncovered(model, WeightLayout.of(model))
    ['1.weight (Conv1d)']
    """
    modules, out = dict(model.named_modules()), []
    for name in layout.names:
        prefix, _, leaf = name.rpartition(".")
        module = modules[prefix]
        known = type(module) is nn.Linear or (type(module) is nn.Conv2d and module.padding_mode == "zeros")
        if not known or leaf != "weight" or isinstance(getattr(module, "padding", 0), str):
            padding = getattr(module, "padding", 0)
            mode = padding if isinstance(padding, str) else getattr(module, "padding_mode", "zeros")
            out.append(f"{name} ({type(module).__name__}{'' if mode == 'zeros' else f', padding {mode!r}'})")
    return out


def covers(model: nn.Module, layout: WeightLayout) -> bool:
    """Whether all prunable weights belong to layers that this path knows how to multiply out."""
    return not uncovered(model, layout)


def rows_by_layer(
    model: nn.Module, loss: Loss, layout: WeightLayout, inputs: Tree, targets: Tree, rows: int
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the losses of `rows` mini-batches, per tensor [rows, …], and those losses' mean.

    `inputs` holds the mini-batches one after the other, all of one size. The loss is taken mini-batch by mini-batch,
    so that it may be any function of one; the samples must lie along the first dimension of the model's output and of
    what its layers read.
    """
    modules = dict(model.named_modules())
    pieces: dict[str, Tensor] = {}
    handles = []

    def catch(name: str, module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        x = (args[0] if args else named["input"]).detach()
        if not output.requires_grad:  # the first layer after an embedding: the graph starts here
            output = output.detach().requires_grad_()
        output.register_hook(partial(collect, name, module, x, x._version))
        return output

    def collect(name: str, module: nn.Module, x: Tensor, version: int, grad: Tensor) -> None:
        if x._version != version:
            raise ValueError(f"the input of the layer of {name} is overwritten in place; use method='vmap'")
        piece = _product(module, x, grad.detach(), rows)
        pieces[name] = pieces[name] + piece if name in pieces else piece  # a layer called twice adds up

    for name in layout.names:
        module = modules[name.rpartition(".")[0]]
        handles.append(module.register_forward_hook(partial(catch, name), with_kwargs=True))
    try:
        # Detached parameters: autograd then only computes the gradients at the layers' outputs. Contiguous ones and
        # inputs: patches of a channels-last tensor take more than twice as long.
        state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        probe = mapped(lambda t: t.detach().contiguous().requires_grad_(t.is_floating_point()), inputs)
        output = torch.func.functional_call(model, state, *arguments(probe))
        values = _losses(loss, output, targets, rows)
        values.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    nothing = values.detach().new_zeros(())  # the gradient of a layer that the forward pass does not use
    found = [
        pieces[name] if name in pieces else nothing.expand(rows, size)
        for name, size in zip(layout.names, layout.sizes, strict=True)
    ]
    return found, values.detach().mean()


def _losses(loss: Loss, output: Any, targets: Tree, rows: int) -> Tensor:
    """The loss of each mini-batch, [rows]."""
    if rows == 1:
        return loss(output, targets).reshape(1)
    parts, form = pytree.tree_flatten(output)  # a tensor, or what a model wraps several in
    if not all(isinstance(t, Tensor) and t.ndim and t.shape[0] == samples(targets) for t in parts):
        raise ValueError("the model's output has no first dimension of samples: use method='vmap' or 'loop'")
    parts, targets = [by_row(t, rows) for t in parts], by_row(targets, rows)
    try:
        return torch.func.vmap(loss)(pytree.tree_unflatten(parts, form), targets)
    except RuntimeError:  # a loss that looks at its values
        each = [(pytree.tree_unflatten([t[i] for t in parts], form), _row(targets, i)) for i in range(rows)]
        return torch.stack([loss(*pair).reshape(()) for pair in each])


def _row(tree: Tree, i: int) -> Tree:
    return mapped(lambda t: t[i], tree)


def _product(module: nn.Module, x: Tensor, grad: Tensor, rows: int) -> Tensor:
    if isinstance(module, nn.Linear):
        left = grad.reshape(rows, -1, module.out_features)
        right = x.reshape(rows, -1, module.in_features)
        return left.transpose(1, 2) @ right
    assert isinstance(module, nn.Conv2d)
    groups, channels = module.groups, module.out_channels
    # unfold orders its rows (channel, kernel y, kernel x), the order of the weight tensor
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    left = grad.reshape(-1, channels // groups, patches.shape[-1])
    right = patches.reshape(len(left), -1, patches.shape[-1])
    # one product per sample and group, summed afterwards: joining the samples first would copy the patches
    return torch.bmm(left, right.transpose(1, 2)).reshape(rows, -1, channels * right.shape[1]).sum(1)
