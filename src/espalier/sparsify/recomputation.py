"""Activation checkpointing, which computes parts of the network anew when their gates are no longer drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from espalier.errors import TrainingError


@contextmanager
def recomputation_refused(model: nn.Module) -> Iterator[None]:
    """Within, for the backward pass: :class:`TrainingError` if a module of the model runs."""

    def refuse(module: nn.Module, args: Any) -> None:
        path = next((name for name, own in model.named_modules() if own is module), None)
        if path is not None:
            raise TrainingError(
                f"'{path}' is computed again in the backward pass (activation checkpointing), when the gates of the "
                "forward pass are gone: its gradients would be wrong. Turn checkpointing off while gates train "
                "(gradient_checkpointing_disable() in transformers, set_grad_checkpointing(False) in timm)."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
