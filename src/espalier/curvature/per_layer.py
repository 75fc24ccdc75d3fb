"""Gradients of mini-batch losses from one backward pass, by per-layer products.

Row i of A is a sum, over the samples of mini-batch i, of what each sample adds to the weight's gradient.
For linear and convolution layers that is a product of the layer's input and the gradient at its output, so
the backward pass that finds the output gradients once is all the automatic differentiation needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.curvature.layout import WeightLayout

Loss = Callable[[Tensor, Tensor], Tensor]


def covers(model: nn.Module, layout: WeightLayout) -> bool:
    """Whether all prunable weights belong to layers that this path knows how to multiply out."""
    modules = dict(model.named_modules())
    for name in layout.names:
        prefix, _, leaf = name.rpartition(".")
        module = modules[prefix]
        known = type(module) is nn.Linear or (type(module) is nn.Conv2d and module.padding_mode == "zeros")
        if not known or leaf != "weight" or isinstance(getattr(module, "padding", 0), str):
            return False
    return True


def rows_by_layer(
    model: nn.Module, loss: Loss, layout: WeightLayout, inputs: Tensor, targets: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `rows` mini-batch mean losses, shape [rows, p], and those losses' sum of means.

    `inputs` holds the mini-batches one after the other, all of one size. `loss` must average over samples.
    """
    modules = dict(model.named_modules())
    pieces: dict[str, Tensor] = {}
    handles = []

    def catch(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].detach()
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
        handles.append(module.register_forward_hook(partial(catch, name)))
    try:
        # Detached parameters: autograd then only computes the gradients at the layers' outputs. Contiguous ones and
        # inputs: patches of a channels-last tensor take more than twice as long.
        state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        probe = inputs.detach().contiguous().requires_grad_(inputs.is_floating_point())
        output = torch.func.functional_call(model, state, (probe,))
        value = loss(output, targets)
        (value * rows).backward()
    finally:
        for handle in handles:
            handle.remove()
    nothing = value.detach().new_zeros(())  # the gradient of a layer that the forward pass does not use
    parts = [
        pieces[name].reshape(rows, -1) if name in pieces else nothing.expand(rows, size)
        for name, size in zip(layout.names, layout.sizes, strict=True)
    ]
    return torch.cat(parts, dim=1), value.detach()


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
