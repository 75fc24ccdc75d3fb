"""i-SpaSP with auxiliary training: the five-step variant, corrected, on second moments or on mini-batches.

Corrections of the paper's Algorithm 1: it starts from W = 0 (its W = W1 makes the gradient vanish);
sparsity is by columns; η is the exact line search of each step, on that step's support; the trained columns
are returned, not those of W1; new columns may start from their dense values; columns can be ranked by what
they contribute to the output instead of by bare norms, which depend on the scale of each neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from espalier.select.refit import RIDGE, Reconstruction, Selection, solve_on, unit_power, with_weights

Solver = Literal["gradient", "pcg", "exact"]


class Objective(Protocol):
    """What the algorithm needs to know of a layer: products with K, the right-hand side, the error."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def block(self) -> int: ...
    @property
    def cross(self) -> Tensor: ...
    def product(self, weights: Tensor) -> Tensor: ...
    def restricted(self, index: Tensor) -> Callable[[Tensor], Tensor]: ...
    def diagonal(self) -> Tensor: ...
    def objective(self, weights: Tensor) -> float: ...


@dataclass(frozen=True)
class AuxiliaryOptions:
    """Options of the five-step variant.

    `iterations` T; `steps` m, the total number of descent steps on the support in each iteration (the
    paper's m); `solver` of Steps III and V: "gradient" with exact line search, "pcg" (diagonally
    preconditioned conjugate gradients, at most `steps` of them), or "exact" (the pseudo-inverse, i.e. least
    squares); `ranking` "norm" ranks columns by ‖G_i‖ and ‖Q_i‖ as the paper does, "scaled" by ‖G_i‖/‖H_i‖
    and ‖Q_i‖·‖H_i‖; `entry` is where a new column starts: at "zero" (the paper) or at its "dense" value;
    `best` returns the best iterate rather than the last.
    """

    iterations: int = 20
    steps: int = 5
    solver: Solver = "gradient"
    ranking: Literal["norm", "scaled"] = "scaled"
    entry: Literal["zero", "dense"] = "dense"
    best: bool = True


PAPER = AuxiliaryOptions(ranking="norm", entry="zero", best=False)


def auxiliary(problem: Reconstruction, size: int, options: AuxiliaryOptions | None = None) -> Selection:
    """Keep `size` units by the five-step variant, on second moments.

    >>> from espalier.select.refit import reconstruction
    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> problem = reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T)
    >>> len(auxiliary(problem, 4, AuxiliaryOptions(solver="exact")).support)
    4

    Each iteration, with G = W K − C: (I) G; (II) D = S ∪ top-s of G outside S; (III) Q = W − η G_D with
    η = ‖G_D‖² / tr(G_D K G_Dᵀ); (IV) S = top-s of Q, W = Q_S; (V) m − 1 more such steps on S.
    Cost O(T·d_out·d·(d + m·s)) at most.
    """
    size = problem.check_size(size)
    weights, support = run(problem, size, options or AuxiliaryOptions())
    return with_weights(problem, support, weights[:, problem.column_index(support)])


def run(objective: Objective, size: int, options: AuxiliaryOptions) -> tuple[Tensor, Tensor]:
    """The weights [d_out, d] (zero off the support) and the support [size], for any Objective."""
    weights = torch.zeros_like(objective.weight)
    kept = torch.zeros(weights.shape[1] // objective.block, dtype=torch.bool, device=weights.device)
    best = (float("inf"), weights, kept)
    for _ in range(options.iterations):
        weights, kept = iterate(objective, weights, kept, size, options)
        if options.best:
            value = objective.objective(weights)
            if value >= best[0] and bool((best[2] == kept).all()) and options.solver == "exact":
                break
            best = min(best, (value, weights, kept), key=lambda item: item[0])
    if options.best:
        _, weights, kept = best
    return weights, kept.nonzero().flatten()


def iterate(
    objective: Objective, weights: Tensor, kept: Tensor, size: int, options: AuxiliaryOptions
) -> tuple[Tensor, Tensor]:
    """One iteration: from W [d_out, d] with support mask `kept` [units] to the next W and mask."""
    block, power = objective.block, objective.diagonal()
    gradient = objective.product(weights) - objective.cross  # I
    score = unit_power(gradient / power.sqrt() if options.ranking == "scaled" else gradient, block)
    score = torch.where(kept, -torch.inf, score)
    merged = kept.clone()  # II
    merged[score.topk(min(size, int((~kept).sum()))).indices] = True
    start = weights
    if options.entry == "dense":
        start = weights + objective.weight * (merged & ~kept).repeat_interleave(block)
    moved = descend(objective, start, merged, 1, options)  # III
    contribution = moved * power.sqrt() if options.ranking == "scaled" else moved
    inside = torch.where(merged, unit_power(contribution, block), -torch.inf)
    next_kept = torch.zeros_like(kept)  # IV
    next_kept[inside.topk(size).indices] = True
    return descend(objective, moved, next_kept, options.steps - 1, options), next_kept  # V


def descend(objective: Objective, weights: Tensor, kept: Tensor, steps: int, options: AuxiliaryOptions) -> Tensor:
    """Truncate W [d_out, d] to the units `kept`, then lower the objective over their columns."""
    index = kept.repeat_interleave(objective.block).nonzero().flatten()
    product, right = objective.restricted(index), objective.cross[:, index]
    found = weights[:, index]
    if options.solver == "exact":
        if not isinstance(objective, Reconstruction):
            raise ValueError("the exact solver needs second moments: build a reconstruction, or use solver='pcg'")
        found = solve_on(objective, index)
    elif options.solver == "pcg":
        found = _conjugate_gradients(product, found, right, objective.diagonal()[index], options.steps)
    elif steps > 0:
        gradient = product(found) - right
        for _ in range(steps):
            image = product(gradient)
            curvature = float((image * gradient).sum())
            if not curvature > 0:
                break
            rate = float((gradient * gradient).sum()) / curvature  # the exact line search
            found = found - rate * gradient
            gradient = gradient - rate * image
    result = torch.zeros_like(weights)
    result[:, index] = found
    return result


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], weights: Tensor, right: Tensor, diagonal: Tensor, steps: int
) -> Tensor:
    """Every output row is its own linear system; the preconditioner is the diagonal of K."""
    residual = right - product(weights)
    direction = residual / diagonal
    rho = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, rho / curvature.clamp_min(1e-300), 0.0)
        weights = weights + step * direction
        residual = residual - step * image
        scaled = residual / diagonal
        new = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(rho > 0, new / rho.clamp_min(1e-300), 0.0) * direction
        rho = new
    return weights


class BatchedReconstruction:
    """The same Objective computed from mini-batches in every product; for data that is cheap to replay.

    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> data = BatchedReconstruction(torch.randn(3, 8, dtype=torch.float64), lambda: H.split(20, dim=1))
    >>> _, support = run(data, 4, AuxiliaryOptions())
    >>> len(support)
    4

    `batches()` starts a pass over pieces [d, B] of the dense activations. Gradients and curvatures are sums
    over *all* batches, so that numerator and denominator of η share their scale. `ridge` is relative, as in
    `reconstruction`.
    """

    def __init__(
        self, weight: Tensor, batches: Callable[[], Iterable[Tensor]], block: int = 1, ridge: float = RIDGE
    ) -> None:
        self.weight, self.block = weight.detach().double(), block
        self._batches = batches
        power = torch.zeros_like(self.weight[0])
        for hidden in batches():
            power += hidden.double().square().sum(1)
        self._ridge = ridge * float(power.mean())
        self._power = power + self._ridge
        self.cross = self.product(self.weight)

    def product(self, weights: Tensor) -> Tensor:
        total = self._ridge * weights
        for hidden in self._batches():
            hidden = hidden.double()
            total = total + (weights @ hidden) @ hidden.T
        return total

    def restricted(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        def product(weights: Tensor) -> Tensor:
            total = self._ridge * weights
            for hidden in self._batches():
                rows = hidden[index].double()
                total = total + (weights @ rows) @ rows.T
            return total

        return product

    def diagonal(self) -> Tensor:
        return self._power

    def objective(self, weights: Tensor) -> float:
        change = weights - self.weight
        data = sum(float((change @ hidden.double()).square().sum()) for hidden in self._batches())
        return data + self._ridge * float(change.square().sum())


def auxiliary_layers(
    problems: Callable[[Sequence[Tensor] | None], Sequence[Reconstruction]],
    sizes: Sequence[int],
    options: AuxiliaryOptions | None = None,
) -> list[Selection]:
    """All layers updated at once: every iteration re-measures every layer with the others as they now are.

    `problems(None)` states the dense problems; `problems(weights)` states them anew with the consumers'
    weights [d_out, d] (zero off the supports) in place, so that the inputs of later layers carry the errors
    of earlier ones. One pass of the data per iteration, for all layers together.
    """
    options = options or AuxiliaryOptions()
    current = problems(None)
    if len(current) != len(sizes):
        raise ValueError(f"{len(current)} layers but {len(sizes)} sizes")
    for problem, size in zip(current, sizes, strict=True):
        problem.check_size(size)
    weights = [torch.zeros_like(problem.weight) for problem in current]
    kept = [torch.zeros(p.units, dtype=torch.bool, device=p.gram.device) for p in current]
    for step in range(options.iterations):
        if step:
            current = problems(weights)
        for layer, (problem, size) in enumerate(zip(current, sizes, strict=True)):
            weights[layer], kept[layer] = iterate(problem, weights[layer], kept[layer], size, options)
    supports = [mask.nonzero().flatten() for mask in kept]
    final = problems(weights)
    return [
        with_weights(problem, support, w[:, problem.column_index(support)])
        for problem, support, w in zip(final, supports, weights, strict=True)
    ]
