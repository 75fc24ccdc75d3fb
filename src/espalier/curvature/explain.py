"""What is wrong where a model or a loss cannot take a batch, in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.curvature.batches import Tree, apply, leaves, shapes


def explanation(model: nn.Module, loss: Callable[..., Any], inputs: Tree, targets: Tree) -> str | None:
    """Run the model, the loss and its backward pass plainly, and say which of them fails, where, and on what.

    >>> print(explanation(nn.Sequential(nn.Linear(3, 2)), nn.functional.mse_loss, torch.ones(4, 5), torch.ones(4, 2)))
    the model cannot take inputs of (4, 5) (float32): 0 (Linear) was given (4, 5): mat1 and mat2 shapes cannot be ...

    None where nothing fails.
    """
    path: list[str] = []

    def enter(name: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        path.append(
            f"{name} ({type(module).__name__}) was given {shapes(args[0] if len(args) == 1 else args or named)}"
        )

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name or "the model"), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_: path.pop() and None))
    try:
        output = apply(model, inputs)
    except Exception as error:
        where = f"{path[-1]}: " if path else ""
        return f"the model cannot take inputs of {_shown(inputs)}: {where}{first_line(error)}"
    finally:
        for handle in handles:
            handle.remove()
    try:
        value = loss(output, targets)
    except Exception as error:
        given = shapes(output.detach()) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        return f"the loss cannot take an output of {given} with targets of {_shown(targets)}: {first_line(error)}"
    if not isinstance(value, Tensor) or value.numel() != 1:
        return f"the loss gives {_result(value)}: it must be one number per mini-batch, a mean over its samples"
    if not value.requires_grad:
        return "the loss has no gradient: it does not depend on the trainable weights by differentiable operators"
    try:
        torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    except Exception as error:
        return f"the backward pass through the model and the loss fails: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind.

    >>> first_line(ValueError("one\\ntwo")), first_line(AssertionError())
    ('one', 'AssertionError')
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _result(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _shown(tree: Tree) -> str:
    """Shapes and types, with the range of whole numbers: class labels and tokens."""
    kinds = []
    for leaf in leaves(tree):
        kind = str(leaf.dtype).removeprefix("torch.")
        whole = not leaf.is_floating_point() and leaf.numel()
        kinds.append(f"{kind} from {int(leaf.min())} to {int(leaf.max())}" if whole else kind)
    return f"{shapes(tree)} ({', '.join(kinds)})"
