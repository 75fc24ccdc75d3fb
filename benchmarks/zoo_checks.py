"""What the zoo table and tests/test_zoo.py check of one model."""

import random
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import espalier
from espalier.graph.trace import Trace


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def run_from_same_state(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Any:
    """One forward pass under one seed; (outputs, what it left in the buffers), the buffers put back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [(m, m.training) for m in model.modules()]
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = tensors(model.train(training)(*args, **kwargs))
        return outputs, {name: buffer.clone() for name, buffer in model.named_buffers()}
    finally:
        for module, mode in modes:
            module.training = mode
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ or one is NaN alone."""
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    gap = torch.where(a == b, 0.0, (a.double() - b.double()).abs()).nan_to_num(0.0, posinf=float("inf"))
    return float(gap.max()) if gap.numel() else 0.0


def round_trip(traced: Trace, training: bool) -> float:
    """Largest difference between the outputs of model and trace, and between the buffers that they leave.

    Where the model returns more in train mode than the trace does, the first output alone is compared.
    """
    outputs, buffers = run_from_same_state(traced.model, traced.args, traced.kwargs, training)
    again, left = run_from_same_state(traced.graph_module, traced.args, traced.kwargs, training)
    if len(outputs) != len(again):
        outputs, again = outputs[:1], again[:1]
    gaps = [difference(a, b) for a, b in zip(outputs, again, strict=True)]
    gaps += [difference(buffers[name], left[name]) for name in buffers.keys() & left.keys()]
    return max(gaps, default=float("inf"))


def without_dropout(model: nn.Module) -> bool:
    """Set every probability of dropping something to zero: dropped branches draw in another order.

    Returns whether there were any.
    """
    found = False
    for module in model.modules():
        dropping = "drop" in type(module).__name__.lower() or "StochasticDepth" in type(module).__name__
        for name, value in list(vars(module).items()):
            probability = "drop" in name or (dropping and name == "p")
            if probability and isinstance(value, float) and value > 0.0:
                setattr(module, name, 0.0)
                found = True
    return found


def generic(model: nn.Module) -> nn.Module:
    """Give every scale, shift and running average a value of its own: a zero scale would hide mistakes."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.ndim < 2 or parameter.std() == 0:
                    parameter.add_(0.1 * noise(parameter))
            mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
                mean.add_(0.1 * noise(mean))
                variance.mul_(1 + 0.1 * noise(variance).clamp(-5, 5))
    return model


def in_double(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


def relative(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest difference between outputs (those that both return), relative to each one's largest entry."""
    gaps = [0.0]
    for x, y in zip(a, b, strict=False):
        scale = float(x.double().nan_to_num(0.0).abs().max()) if x.is_floating_point() and x.numel() else 1.0
        gaps.append(difference(x, y) / max(scale, 1e-30))
    return max(gaps)


def random_removal(space: espalier.SearchSpace, seed: int) -> espalier.Solution:
    """Structures in random order, each taken where the removal stays valid, up to a random number."""
    rng = random.Random(seed)
    names = [s.name for s in space.structures]
    rng.shuffle(names)
    return space.solution(removed=space.removable_in_order(names, stop_at=rng.randint(1, max(1, len(names) * 2 // 3))))


def constructed(space: espalier.SearchSpace, solution: espalier.Solution) -> dict[bool, float]:
    """For eval (False) and train mode (True): the largest relative difference of masked and small network."""
    masked, small = space.masked(solution), espalier.construct(space, solution)
    args, kwargs = space.trace.args, space.trace.kwargs
    return {
        mode: relative(
            run_from_same_state(masked, args, kwargs, mode)[0],
            run_from_same_state(small, args, kwargs, mode)[0],
        )
        for mode in (False, True)
    }
