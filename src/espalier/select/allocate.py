"""Sizes across layers from their error-versus-size curves, under a cost budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.curvature.moments import call
from espalier.modes import evaluating


def allocate(
    errors: Sequence[Tensor],
    cost: Callable[[Sequence[int]], float],
    budget: float,
    *,
    minimum: int = 1,
    multiple: int = 1,
    allowed: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """How many units each layer keeps so that the summed error is small and `cost(sizes)` is at most
    `budget`.

    >>> curves = [torch.tensor([9.0, 4.0, 1.0, 0.0]), torch.tensor([9.0, 1.0, 0.5, 0.0])]
    >>> allocate(curves, cost=lambda sizes: float(sum(sizes)), budget=4)
    [3, 1]

    `errors[l][s]` is the error of layer l at size s, from 0 to all its units (inf where unknown), in units
    that can be added up over layers. `cost` is in any unit; it must not decrease in any size, and need not
    be linear. Every layer keeps at least `minimum`, and a multiple of `multiple` or everything; or one of its `allowed`
    sizes, ascending.

    From the full sizes, the layer whose next step down its curve's lower convex hull costs the least error
    per unit of cost freed gives way, until the budget holds; what the last step freed too much is then
    given back in single steps. For a linear cost this is the optimum of the hulls up to that last step.

    Raises ValueError where even the smallest sizes cost more than `budget`, naming what they cost.
    """
    curves = [curve.detach().double().tolist() for curve in errors]
    if allowed is None:
        allowed = [_allowed(curve, minimum, multiple) for curve in curves]
    smallest, sizes = [sizes[0] for sizes in allowed], [sizes[-1] for sizes in allowed]
    if cost(smallest) > budget:
        raise ValueError(
            f"the budget {budget:g} cannot be met by these layers: the least they can cost is "
            f"{cost(smallest):g} ({', '.join(map(str, smallest))} units); raise the budget or include more layers"
        )
    hulls = [_hull(steps, curve) for steps, curve in zip(allowed, curves, strict=True)]
    now = cost(sizes)
    while now > budget:
        offers = []
        for layer, hull in enumerate(hulls):
            if len(hull) > 1:
                trial = _replaced(sizes, layer, hull[-2])
                freed = now - cost(trial)
                lost = curves[layer][hull[-2]] - curves[layer][hull[-1]]
                offers.append((lost / freed if freed > 0 else float("inf"), layer))
        _, layer = min(offers)
        hulls[layer].pop()
        sizes[layer] = hulls[layer][-1]
        now = cost(sizes)
    return _give_back(sizes, allowed, curves, cost, budget)


def mac_cost(
    model: nn.Module, groups: Sequence[tuple[int, Sequence[str]]], example: Any
) -> Callable[[Sequence[int]], float]:
    """Multiply-adds per sample of the model's Linear and Conv2d layers, as a function of the groups' sizes.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> mac_cost(model, [(16, ["0", "2"])], torch.rand(1, 4))([8])
    48.0

    A group is its number of units and the dotted names of the layers that scale with them; a layer in two
    groups scales with both. Runs `example` once. Products of activations (attention scores) are not
    counted.
    """
    macs: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def hook(m: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
                weight: Tensor = m.weight  # type: ignore[assignment]
                macs[name] = macs.get(name, 0.0) + out[0].numel() // weight.shape[0] * weight.numel()

            handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad(), evaluating(model):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()

    def cost(sizes: Sequence[int]) -> float:
        share = dict.fromkeys(macs, 1.0)
        for (units, names), size in zip(groups, sizes, strict=True):
            for name in names:
                if name in share:
                    share[name] *= size / units
        return sum(base * share[name] for name, base in macs.items())

    return cost


def _give_back(
    sizes: list[int],
    allowed: Sequence[Sequence[int]],
    curves: Sequence[Sequence[float]],
    cost: Callable[[Sequence[int]], float],
    budget: float,
) -> list[int]:
    while True:
        now, offers = cost(sizes), []
        for layer, size in enumerate(sizes):
            above = [step for step in allowed[layer] if step > size]
            if above:
                added = cost(_replaced(sizes, layer, above[0])) - now
                if now + added <= budget:
                    gain = curves[layer][size] - curves[layer][above[0]]
                    offers.append((gain / added if added > 0 else float("inf"), -layer, above[0]))
        if not offers:
            return sizes
        _, layer, size = max(offers)
        sizes[-layer] = size


def _replaced(sizes: Sequence[int], layer: int, size: int) -> list[int]:
    return [size if index == layer else value for index, value in enumerate(sizes)]


def _allowed(curve: Sequence[float], minimum: int, multiple: int) -> list[int]:
    full = len(curve) - 1
    steps = {s for s in range(minimum, full + 1) if s % multiple == 0 and curve[s] < float("inf")}
    return sorted(steps | {full})


def _hull(sizes: Sequence[int], curve: Sequence[float]) -> list[int]:
    """Sizes on the lower convex hull of the curve."""
    kept: list[int] = []
    for size in sizes:
        while len(kept) >= 2:
            a, b = kept[-2:]
            if (curve[b] - curve[a]) * (size - a) >= (curve[size] - curve[a]) * (b - a):
                kept.pop()
            else:
                break
        kept.append(size)
    return kept
