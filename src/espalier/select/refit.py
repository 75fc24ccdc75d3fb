"""The layer reconstruction problem that every one-shot selector solves, and its exact solution.

A consumer with dense weight ``W1`` reads hidden activations ``H`` (one row per hidden column) and writes
``U = W1 H``. After pruning it reads only the columns of a support ``S``, and may read activations ``Ht`` that
earlier pruning has already changed. Everything about the data that matters is ``K = Ht Htᵀ``, ``C = U Htᵀ``
and ``tr UUᵀ``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.curvature.moments import Moments

RIDGE = 1e-6


@dataclass(frozen=True)
class Reconstruction:
    """One layer's reconstruction problem, held as second moments; build it with `reconstruction`.

    Fields: `weight` [d_out, d]; `gram` [d, d] is ``K + ρI``; `cross` [d_out, d] is ``C + ρ W1``, the right-hand side
    of the normal equations ``W (K + ρI) = C + ρ W1``; `offset` [d_out, d] is ``C − W1 K`` (None
    where the inputs are the dense ones, when it is zero); `floor` is the error of keeping all dense
    weights; `energy` is ``tr UUᵀ``; `ridge` is ρ; `block` columns make one unit; `mean` [d] and
    `target_mean` [d_out] are the averages of ``Ht`` and ``U``; `centred` says whether the moments are
    centred. All tensors are float64.

    The objective is ``‖W Ht − U‖² + ρ‖W − W1‖²``: the ridge pulls towards the dense weight, so that keeping
    everything returns exactly the dense layer.
    """

    weight: Tensor
    gram: Tensor
    cross: Tensor
    offset: Tensor | None
    floor: float
    energy: float
    ridge: float
    block: int
    mean: Tensor | None
    target_mean: Tensor | None
    centred: bool

    @property
    def columns(self) -> int:
        """Number of hidden columns d."""
        return self.weight.shape[1]

    @property
    def units(self) -> int:
        """Number of removable units, d / block."""
        return self.columns // self.block

    @property
    def dead(self) -> Tensor:
        """Indices of units whose activations are zero on all calibration data; selectors take them last."""
        power = (self.gram.diagonal() - self.ridge).view(self.units, self.block).sum(1)
        return (power <= 1e-12 * self.gram.diagonal().mean()).nonzero().flatten()

    def product(self, weights: Tensor) -> Tensor:
        """``W (K + ρI)`` for W [d_out, d]; columns of W that are zero cost nothing."""
        used = weights.any(0).nonzero().flatten()
        return weights[:, used] @ self.gram[used] if 2 * len(used) <= self.columns else weights @ self.gram

    def restricted(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        """The product with the columns [n] of `index` only: maps [d_out, n] to [d_out, n]."""
        gram = self.gram if len(index) == self.columns else self.gram[index[:, None], index]
        return lambda weights: weights @ gram

    def diagonal(self) -> Tensor:
        """Diagonal of ``K + ρI`` [d]."""
        return self.gram.diagonal()

    def objective(self, weights: Tensor) -> float:
        """``‖W Ht − U‖² + ρ‖W − W1‖²`` for W [d_out, d]."""
        change = weights - self.weight
        value = self.floor + inner(change @ self.gram, change)
        if self.offset is not None:
            value -= 2.0 * inner(change, self.offset)
        return max(value, 0.0)

    def objective_of_nothing(self) -> float:
        """``‖U‖² + ρ‖W1‖²``, the objective of W = 0."""
        value = self.floor + inner(self.weight, self.cross)
        if self.offset is not None:
            value += inner(self.weight, self.offset)
        return value

    def error(self, weights: Tensor) -> float:
        """``‖W Ht − U‖²`` (centred, if the moments are) for W [d_out, d]; no ridge term."""
        change = weights - self.weight
        return max(self.objective(weights) - self.ridge * inner(change, change), 0.0)

    def column_index(self, support: Tensor) -> Tensor:
        """The columns [s·block] of the units in `support` [s]."""
        if self.block == 1:
            return support
        offsets = torch.arange(self.block, device=support.device)
        return (support[:, None] * self.block + offsets).flatten()

    def check_size(self, size: int) -> int:
        """`size` if ``1 <= size <= units``; otherwise ValueError."""
        if not 1 <= size <= self.units:
            raise ValueError(
                f"cannot keep {size} of {self.units} units: choose a size from 1 to {self.units}"
                + ("; to remove the whole layer, remove its segment instead" if size < 1 else "")
            )
        return size


@dataclass(frozen=True)
class Selection:
    """What a selector returns for one layer.

    `support` [s] holds the kept units in ascending order; `weights` [d_out, s·block] the consumer's new
    weight; `bias` [d_out] what to add to the consumer's bias (None where the problem has no means); `error`
    is ``‖W Ht − U‖²``, and `energy` is ``‖U‖²`` in the same (centred or raw) sense.
    """

    support: Tensor
    weights: Tensor
    bias: Tensor | None
    error: float
    energy: float

    @property
    def relative(self) -> float:
        """``error / energy``."""
        return self.error / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Path:
    """All sizes of a nested greedy selection.

    `order` [n]: the first s entries are the support of size s. `errors` [n + 1]: the regularised objective
    of the refitted layer at sizes 0 to n, never increasing.
    """

    order: Tensor
    errors: Tensor

    def support(self, size: int) -> Tensor:
        """Units kept at `size`, ascending."""
        if not 1 <= size <= len(self.order):
            raise ValueError(f"the path holds sizes 1 to {len(self.order)}, not {size}: rerun with a larger size")
        return self.order[:size].sort().values


def reconstruction(
    weight: Tensor,
    moment: Tensor,
    *,
    cross: Tensor | None = None,
    energy: float | None = None,
    block: int = 1,
    ridge: float = RIDGE,
    mean: Tensor | None = None,
    target_mean: Tensor | None = None,
    count: int = 0,
    centred: bool = False,
) -> Reconstruction:
    """State one layer's reconstruction problem from plain matrices.

    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> W1 = torch.randn(3, 8, dtype=torch.float64)
    >>> reconstruction(W1, H @ H.T).units
    8

    `weight` [d_out, d]; `moment` K = Ht Htᵀ [d, d]; `cross` C = U Htᵀ [d_out, d] and `energy` tr UUᵀ are
    given together, and only where the inputs are no longer the dense ones; `block` columns form one unit;
    `ridge` is relative, ρ = ridge · tr K / d. With `centred`, K, C and the energy must still be the raw
    sums; `mean` [d], `count` and (with a cross moment) `target_mean` [d_out] are then used to centre them,
    which is the same as fitting the output bias jointly. Everything is converted to float64.

    Raises ValueError for shapes that do not fit, moments that are not finite, and activations that are all
    zero.
    """
    weight, moment = weight.detach().double(), moment.detach().double()
    d_out, d = weight.shape
    if moment.shape != (d, d):
        raise ValueError(
            f"the weight has {d} columns, so the second moment must be [{d}, {d}], not {list(moment.shape)}"
        )
    if block < 1 or d % block:
        raise ValueError(f"{d} columns do not divide into blocks of {block}")
    if (cross is None) != (energy is None):
        raise ValueError("give the cross moment C = U Htᵀ and the energy tr UUᵀ together, or neither")
    if ridge < 0:
        raise ValueError(f"the ridge is relative and not negative, got {ridge}")
    if cross is not None:
        cross = cross.detach().double()
        if cross.shape != (d_out, d):
            raise ValueError(f"the cross moment must be [{d_out}, {d}], not {list(cross.shape)}")
    for name, value in (("weight", weight), ("second moment", moment), ("cross moment", cross)):
        if value is not None and not bool(torch.isfinite(value.sum())):
            raise ValueError(f"the {name} holds NaN or infinity: check the activations it was computed from")
    if mean is not None:
        mean = mean.detach().double()
        dense_mean = weight @ mean if target_mean is None else target_mean.detach().double()
    else:
        dense_mean = None
    if centred:
        if mean is None or dense_mean is None or count < 1:
            raise ValueError("centring needs the mean activation and the number of samples")
        moment = torch.addr(moment, mean, mean, alpha=-count)
        if cross is not None and energy is not None:
            cross = cross - count * torch.outer(dense_mean, mean)
            energy = energy - count * float(dense_mean @ dense_mean)
    trace = float(moment.diagonal().sum())
    if not trace > 0:
        raise ValueError("every activation is zero (or constant) on the calibration data: nothing can be selected")
    rho = ridge * trace / d
    product = weight @ moment
    if cross is None:
        offset, floor, energy = None, 0.0, inner(product, weight)
        cross = product.add_(weight, alpha=rho)
    else:
        offset = cross - product
        floor = max(float(energy or 0.0) - 2 * inner(weight, cross) + inner(weight, product), 0.0)
        cross = cross.add(weight, alpha=rho)
    gram = moment if centred else moment.clone()
    gram.diagonal().add_(rho)
    energy = float(energy or 0.0)
    return Reconstruction(weight, gram, cross, offset, floor, energy, rho, block, mean, dense_mean, centred)


def from_moments(
    moments: Moments, weight: Tensor, *, block: int = 1, ridge: float = RIDGE, centred: bool = True
) -> Reconstruction:
    """The reconstruction problem of a consumer with `weight` [d_out, d] that reads the measured inputs.

    >>> moments = Moments.zeros(3)
    >>> moments.add(torch.rand(10, 3))
    >>> from_moments(moments, torch.randn(2, 3)).units
    3

    `centred` fits the bias too. Warns where there are fewer samples than columns (the second moment is then
    singular and the ridge decides between equally good answers). Raises ValueError where there is no sample.
    """
    name = moments.name or "the layer"
    if moments.count == 0:
        raise ValueError(f"no calibration sample reached {name}: the loader is empty")
    mean = moments.sums / moments.count
    spread = moments.gram.diagonal() - (moments.count * mean.square() if centred else 0.0)
    if not float(spread.sum()) > 1e-14 * float(moments.gram.diagonal().sum()):
        raise ValueError(
            f"the input of {name} is constant on the calibration data: nothing can be selected; use more varied data, "
            f"or leave the layer out (keep= of the search space)"
        )
    if moments.count < len(moments.sums):
        warnings.warn(
            f"{name}: {moments.count} samples for {len(moments.sums)} columns; the second moment is singular "
            "and only the ridge makes the refit unique: use more calibration data",
            RuntimeWarning,
            stacklevel=2,
        )
    weight = weight.detach().to(moments.gram)
    cross = energy = target = None
    if moments.cross is not None and moments.dense_gram is not None and moments.dense_sums is not None:
        cross = weight @ moments.cross
        energy = float(((weight @ moments.dense_gram) * weight).sum())
        target = weight @ (moments.dense_sums / moments.count)
    return reconstruction(
        weight,
        moments.gram,
        cross=cross,
        energy=energy,
        block=block,
        ridge=ridge,
        mean=mean,
        target_mean=target,
        count=moments.count,
        centred=centred,
    )


def refit(problem: Reconstruction, support: Tensor) -> Selection:
    """Exact least-squares weights on a given support.

    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> problem = reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T)
    >>> refit(problem, torch.tensor([0, 5])).weights.shape
    torch.Size([3, 2])

    Solves ``W_S (K_SS + ρI) = C_S + ρ W1_S`` by a Cholesky factor (by least squares where that matrix is
    singular, which only a zero ridge allows).
    """
    support = support.sort().values
    problem.check_size(len(support))
    return with_weights(problem, support, solve_on(problem, problem.column_index(support)))


def solve_on(problem: Reconstruction, index: Tensor) -> Tensor:
    """The least-squares weights [d_out, n] on the columns `index` [n], in that order.

    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> problem = reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T)
    >>> torch.allclose(solve_on(problem, torch.arange(8)), problem.weight)
    True
    """
    system, right = problem.gram[index[:, None], index], problem.cross[:, index]
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        return right @ torch.linalg.pinv(system, hermitian=True)
    return torch.cholesky_solve(right.T, factor).T


def residual_of(problem: Reconstruction) -> Callable[[Tensor], Tensor]:
    """What the refit on given units leaves of the right-hand side: support [s] → ``C̃ − W_S K̃_S`` [d_out, d].

    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> problem = reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T)
    >>> float(residual_of(problem)(torch.arange(8)).abs().max()) < 1e-9
    True
    """

    def residual(support: Tensor) -> Tensor:
        index = problem.column_index(support)
        return problem.cross - solve_on(problem, index) @ problem.gram[index]

    return residual


def with_weights(problem: Reconstruction, support: Tensor, weights: Tensor) -> Selection:
    """A Selection with given `weights` [d_out, s·block] on `support`; measures its error, corrects the
    bias."""
    index = problem.column_index(support)
    full = torch.zeros_like(problem.weight)
    full[:, index] = weights
    bias = None
    if problem.mean is not None and problem.target_mean is not None:
        bias = problem.target_mean - weights @ problem.mean[index]
    return Selection(support, weights.contiguous(), bias, problem.error(full), problem.energy)


def keep_dense(problem: Reconstruction, support: Tensor) -> Selection:
    """Keep the dense weights of `support`, without a refit (the published i-SpaSP)."""
    support = support.sort().values
    problem.check_size(len(support))
    return with_weights(problem, support, problem.weight[:, problem.column_index(support)].clone())


def inner(one: Tensor, two: Tensor) -> float:
    """``Σ one ∘ two`` of two tensors of one shape, without a temporary of that shape.

    >>> inner(torch.ones(2, 3), torch.full((2, 3), 2.0))
    12.0
    """
    return float(torch.dot(one.reshape(-1), two.reshape(-1)))


def unit_power(matrix: Tensor, block: int) -> Tensor:
    """Sum of squares of each unit's columns [units], for matrix [rows, units·block]."""
    return torch.linalg.vector_norm(matrix, dim=0).square().view(-1, block).sum(1)
