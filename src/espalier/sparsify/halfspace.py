"""The policies of the half-space family: which groups head for zero, and how.

==========  =========================================  ===============================================
policy      groups that head for zero                  their step
==========  =========================================  ===============================================
HSPG        all, with one lambda                       base, penalty, half-space test
DHSPG       the least salient                          half-space, in a line to zero
H2SPG       the least salient that leave the network   half-space, in a line to zero
            valid
ProxSG+     as H2SPG                                   proximal, with one lambda
==========  =========================================  ===============================================
"""

from bisect import bisect_left
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.errors import BudgetError, TrainingError
from espalier.saliency import Saliency, named, worth
from espalier.space.budget import Budget
from espalier.space.chains import check_feasible, estimate, meet
from espalier.space.search_space import SearchSpace
from espalier.space.selection import select
from espalier.sparsify import foreach
from espalier.sparsify.loop import HalfSpace

LISTED = 50_000  # a solution's file names the saliency of so many structures, not of millions of kernels


class H2SPG(HalfSpace):
    """Hierarchical half-space projected gradient: train once, end with exactly the budget's structures at zero.

    >>> from espalier import Budget, search_space
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.a(x) + self.b(x))
    >>> model, x = Net(), torch.randn(8, 4)
    >>> space = search_space(model, (x,))
    >>> opt = H2SPG(space, budget=Budget(structures=0.5), lr=0.1, warmup_steps=3, projection_steps=4)
    >>> for _ in range(7):
    ...     opt.zero_grad()
    ...     model(x).square().mean().backward()
    ...     opt.step()
    >>> opt.phase, opt.zero_structures(), len(opt.solution().removed)
    ('done', 1, 1)

    ``base`` trains what stays and takes ``lr`` and all further keyword arguments; ``param_groups``, schedulers,
    gradient clipping and gradient scalers work as with ``base`` itself.

    - For ``warmup_steps`` steps, ``base`` trains everything while the saliency is averaged (exponentially, the
      past weighing ``smoothing``). ``saliency`` is a function or the name of one in
      :data:`espalier.saliency.SALIENCIES`; a costly one is taken every ``score_every`` steps only.
    - Then, once, structures are marked redundant in ascending saliency while the network stays valid, until
      the budget is met (Algorithm 3, lines 2 to 11).
    - For ``projection_steps`` steps, ``base`` trains the rest, and a redundant group x takes half-space steps
      (lines 12 to 15): a trial ``y = x - lr (g + lambda x / |x|)`` with lambda = |x| / (lr * steps left), a straight
      line to zero at the last step; every ``test_every`` steps, groups with ``<y, x> < epsilon |x|²`` become zero
      and stay so.
    - Then ``base`` goes on training what stays.

    Structures of all levels go, in one budget: segments, and with ``search_space(..., levels=("segment", "channel",
    "head", "kernel"))`` slices of tensors too (OTOv2's zero-invariant groups). Slices take the same steps, while
    ``base`` trains the rest of their tensor; once zero they stay so, whatever momentum or weight decay do. ``base``
    treats elements one by one here: one that mixes a tensor's elements (LBFGS, Muon) sees the gradients of zero
    slices as well. Where groups overlap, an element is zero as soon as one of its groups is.

    Raises :class:`SpaceError` for an empty search space, :class:`BudgetError` if the budget cannot be met (at
    once, before any training), :class:`TrainingError` for gradients that are not finite (before any parameter
    is touched; on an accelerator one step later, so that a step never waits for the device) and for parameters
    that the search space does not know.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: type[Optimizer] = torch.optim.SGD,
        budget: Budget | None = None,
        *,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        warmup_steps: int = 100,
        projection_steps: int = 100,
        saliency: Saliency | str = "cosine_magnitude",
        smoothing: float = 0.9,
        score_every: int = 1,
        test_every: int = 10,
        epsilon: float = 0.0,
        **base_arguments: Any,
    ):
        if not 0.0 <= smoothing < 1.0 or score_every < 1:
            raise TrainingError("smoothing lies in [0, 1), score_every is at least 1.")
        self.budget = Budget(structures=0.5) if budget is None else budget
        self.saliency = named(saliency)
        self.smoothing, self.score_every = smoothing, score_every
        super().__init__(
            space, base, params, warmup_steps, projection_steps, test_every, epsilon, base_arguments
        )  # fmt: skip
        self._scores = torch.zeros(len(space), device=self.groups.group.device)
        self._check_budget()

    @cached_property
    def expected_removals(self) -> float:
        """About how many structures will go, from random removals (appendix A.2); the search phase is exact."""
        if not self._in_order:
            return float(len(select(self.space, torch.rand(len(self.space)), self.budget).removed))
        return estimate(self.space, self.budget, generator=torch.Generator().manual_seed(0))

    def saliency_scores(self) -> dict[str, float]:
        """The averaged saliency of every structure."""
        return dict(zip(self.space.structures.names, self._scores.tolist(), strict=True))

    def choose(self, ascending: list[str]) -> list[str]:
        """Which structures to drive to zero, given their names in ascending saliency (Algorithm 3, lines 2 to 11).

        Where structures narrow layers, or a latency is bounded, ascending order is a poor guide to a budget:
        :func:`espalier.space.selection.select` solves for it.
        """
        if self._in_order:
            return meet(self.space, ascending, self.budget)
        worths = worth(self.saliency, self._scores, self.groups.size)
        return select(self.space, worths, self.budget).removed

    @property
    def _in_order(self) -> bool:
        """Whether this is the paper's setting."""
        return "latency" not in self.budget.given and all(f.level == "segment" for f in self.space.families)

    def _check_budget(self) -> None:
        if self._in_order:
            check_feasible(self.space, self.budget)
        else:
            select(self.space, torch.ones(len(self.space)), self.budget)

    def _warm_up(self) -> None:
        if self.steps_done % self.score_every == 0:
            self._score()
        self.base.step()

    def _score(self) -> None:
        gradients = [t.grad if t.grad is not None else torch.zeros_like(t) for t in self.groups.tensors]
        score = self.saliency(self.space, self.groups.state(gradients)).to(self._scores)
        weight = self.smoothing if self.steps_done else 0.0
        self._scores.mul_(weight).add_(score, alpha=1.0 - weight)

    def _ascending(self) -> list[str]:
        order = torch.sort(self._scores, stable=True).indices.tolist()
        names = self.space.structures.names
        return [names[i] for i in order]

    def _search(self) -> None:
        self._mark(self.choose(self._ascending()))

    def _move(self, moving: list[Tensor], before: list[Tensor], left: int) -> None:
        """``y = (1 - 1 / left) x - lr g`` for all groups on their way to zero."""
        foreach.add_(moving, moving, alpha=-1.0 / left)
        self._descend(moving)

    def _descend(self, moving: list[Tensor]) -> None:
        for rate, rows in self._by_rate():
            pairs = [(moving[k], g) for k in rows if (g := self._heading.tensors[k].grad) is not None]
            if pairs:
                foreach.add_([t for t, _ in pairs], [g for _, g in pairs], alpha=-rate)

    def _removed(self) -> tuple[str, ...]:
        """Before the search phase ends: what would be marked by the saliency so far."""
        return self.redundant or tuple(self.choose(self._ascending()))

    def _provenance(self) -> dict[str, Any]:
        """The budget and, of up to ``LISTED`` structures, each one's saliency."""
        about: dict[str, Any] = {"budget": vars(self.budget)}
        if len(self.space) <= LISTED:
            about["saliency"] = {name: round(score, 6) for name, score in self.saliency_scores().items()}
        return about

    def _buffers(self) -> dict[str, Tensor]:
        return {**super()._buffers(), "scores": self._scores}


class DHSPG(H2SPG):
    """Dual half-space projected gradient: the least salient structures go, whether or not the network survives.

    >>> from espalier import Budget, search_space
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.a(x) + self.b(x))
    >>> space = search_space(Net(), (torch.randn(8, 4),))
    >>> opt = DHSPG(space, budget=Budget(structures=0.0), lr=0.1)
    >>> opt.solution()
    Traceback (most recent call last):
    espalier.errors.InvalidSolution: the joint vertex 'add' keeps no input: all that enter it are removed ...

    :class:`H2SPG` without its hierarchy (Chen et al., "OTOv2", 2023), for comparison. ``solution()`` raises
    :class:`InvalidSolution` where the network does not survive: segments around a joint vertex that all go, or all
    channels of a family. Parameters and MACs are those of ``space.reachable_cost``.
    """

    def choose(self, ascending: list[str]) -> list[str]:
        least, most = self.budget.structures_to_remove(len(self.space)), len(ascending)
        if self.budget.params is None and self.budget.macs is None:
            return ascending[:least]
        return ascending[: bisect_left(range(most), True, least, key=lambda n: self._within(ascending[:n]))]

    def _within(self, removed: list[str]) -> bool:
        left = {"structures": len(self.space) - len(removed), **vars(self.space.reachable_cost(removed))}
        return self.budget.met_by(left, {"structures": len(self.space), **vars(self.space.reachable_cost(()))})

    def _check_budget(self) -> None:
        if not set(self.budget.given) <= {"structures", "params", "macs"}:
            raise BudgetError(f"DHSPG counts structures, params and macs, not {self.budget}: H2SPG takes latencies.")
        if not self._within(list(self.space.structures.names)):
            raise BudgetError(f"{self.budget} cannot be met, not even without all {len(self.space)} structures.")


class ProxSGPlus(H2SPG):
    """ProxSG+: a group proximal step instead of the half-space step inside :class:`H2SPG`'s search phase.

    >>> from espalier import Budget, search_space
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.a(x) + self.b(x))
    >>> space = search_space(Net(), (torch.randn(8, 4),))
    >>> opt = ProxSGPlus(space, budget=Budget(structures=0.5), lam=0.1, lr=0.1)
    >>> len(opt.solution().removed)
    1

    A redundant group x takes ``y = x - lr g``, then ``max(0, 1 - lr lam / |y|) y``, the proximal map of the group
    lasso with one ``lam`` for all (Xiao & Zhang, 2014). A group that is zero may come back, and nothing makes
    it arrive in time: what is not zero at the last of the ``projection_steps`` is put to zero there, so that the
    budget holds; :meth:`left_over` says how much that was. Where groups overlap, their factors multiply. All else is
    as in :class:`H2SPG`.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: type[Optimizer] = torch.optim.SGD,
        budget: Budget | None = None,
        *,
        lam: float = 1e-3,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        warmup_steps: int = 100,
        projection_steps: int = 100,
        saliency: Saliency | str = "cosine_magnitude",
        smoothing: float = 0.9,
        score_every: int = 1,
        **base_arguments: Any,
    ):
        self.lam = _positive(lam)
        super().__init__(
            space, base, budget, params=params, warmup_steps=warmup_steps, projection_steps=projection_steps,
            saliency=saliency, smoothing=smoothing, score_every=score_every, **base_arguments,
        )  # fmt: skip

    def _move(self, moving: list[Tensor], before: list[Tensor], left: int) -> None:
        self._descend(moving)
        norm = self._heading.at(self._heading.squares(moving).sqrt(), none=torch.inf)
        shrunk = (1.0 - self._rates() * self.lam / norm).clamp_min(0.0)
        foreach.mul_(moving, self._heading.factors(shrunk.nan_to_num(0.0).to(moving[0].dtype)))

    def _gone(self, moving: list[Tensor], before: list[Tensor]) -> Tensor | None:
        return None

    def _provenance(self) -> dict[str, Any]:
        left = {name: round(norm, 6) for name, norm in self.left_over().items()}
        return {**super()._provenance(), "lam": self.lam, "left_over": left}


class HSPG(HalfSpace):
    """Half-space stochastic projected gradient: every group is penalised with one lambda, and there is no budget.

    >>> from espalier import search_space
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.a(x) + self.b(x))
    >>> model, x = Net(), torch.randn(8, 4)
    >>> space = search_space(model, (x,))
    >>> opt = HSPG(space, lam=0.01, lr=0.1, warmup_steps=3, projection_steps=4)
    >>> for _ in range(7):
    ...     opt.zero_grad()
    ...     model(x).square().mean().backward()
    ...     opt.step()
    >>> opt.phase, opt.zero_structures()
    ('done', 0)

    It minimises ``f(x) + lam sum_g |x_g|`` (Chen et al., "Half-space proximal stochastic gradient method", 2020,
    and "Only train once", 2021):

    - For ``warmup_steps`` steps: ``x - lr (g + lam x / |x|)``, a subgradient step.
    - For ``projection_steps`` steps: the same step gives a trial y; every ``test_every`` steps, groups with
      ``<y, x> < epsilon |x|²`` become zero and stay so.
    - Then ``base`` goes on training what is not zero, without the penalty.

    ``base`` makes the gradient's part of the step (SGD without momentum is the published form) and the penalty
    follows it, as decoupled weight decay does; ``base`` takes ``lr`` and all further keyword arguments.
    ``solution()`` removes what is zero and raises :class:`InvalidSolution` where the network does not survive
    that. Raises :class:`SpaceError` and :class:`TrainingError` as :class:`H2SPG` does.
    """

    moves_after_base = True

    def __init__(
        self,
        space: SearchSpace,
        base: type[Optimizer] = torch.optim.SGD,
        *,
        lam: float = 1e-3,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        warmup_steps: int = 100,
        projection_steps: int = 100,
        test_every: int = 1,
        epsilon: float = 0.0,
        **base_arguments: Any,
    ):
        self.lam = _positive(lam)
        super().__init__(
            space, base, params, warmup_steps, projection_steps, test_every, epsilon, base_arguments
        )  # fmt: skip
        self._search()

    def _search(self) -> None:
        """All groups are penalised from the start, and ``base`` goes on training them."""
        self._head_for_zero(range(len(self.space)))

    def _warm_up(self) -> None:
        before = [t.clone() for t in self._heading.tensors]
        self.base.step()
        self._move(list(self._heading.tensors), before, 0)

    def _move(self, moving: list[Tensor], before: list[Tensor], left: int) -> None:
        """``- lr lam x / |x|``, where the group x is not zero."""
        norm = self._heading.at(self._heading.squares(before).sqrt(), none=torch.inf)
        pull = (self._rates() * self.lam / norm).nan_to_num(0.0, posinf=0.0).to(moving[0].dtype)
        foreach.add_(moving, foreach.mul(before, self._heading.factors(pull, torch.add)), alpha=-1.0)

    def _finish(self) -> None:
        self._mark(self._zero_names())
        self._head_for_zero(())

    def _removed(self) -> tuple[str, ...]:
        return self._zero_names()

    def _provenance(self) -> dict[str, Any]:
        return {"lam": self.lam, "epsilon": self.epsilon}

    def _resume(self, redundant: list[str]) -> None:
        self._mark(redundant)
        if self.phase == "done":
            self._head_for_zero(())
        else:
            self._search()


def _positive(lam: float) -> float:
    if not lam > 0.0:
        raise TrainingError(f"lam={lam}: the weight of the penalty is above 0.")
    return lam
