"""One call for problem (5): the default solver, or the paper's."""

from __future__ import annotations

from typing import Literal, SupportsFloat, cast, get_args

from espalier.curvature.watch import Watch, unwatched, watching
from espalier.select.exchange import ExchangeOptions, exchange
from espalier.select.iht import IHTOptions, iht
from espalier.select.inputs import Array, Count, quota_of
from espalier.select.patterns import Quota
from espalier.select.problem import Problem
from espalier.select.result import Result

Solver = Literal["exchange", "iht", "magnitude"]


def solve(
    problem: Problem,
    quota: Quota,
    solver: Solver = "exchange",
    options: ExchangeOptions | IHTOptions | None = None,
    watch: Watch = unwatched,
) -> Result:
    """Solve a prepared problem over the supports that `quota` allows; `watch` shows progress over the rounds."""
    quota = quota_of(quota, problem.p)
    if solver not in get_args(Solver):
        known = ", ".join(f"'{name}'" for name in get_args(Solver))
        raise ValueError(f"no solver is called {solver!r}: there are {known}; stages are `chita_plus_plus`")
    kind = IHTOptions if solver == "iht" else ExchangeOptions
    if options is not None and not isinstance(options, kind):
        raise TypeError(f"solver='{solver}' takes {kind.__name__} as options, not {type(options).__name__}")
    if isinstance(options, IHTOptions) or solver == "iht":
        return iht(problem, quota, cast(IHTOptions | None, options), watch)
    return exchange(problem, quota, ExchangeOptions(rounds=0) if solver == "magnitude" else options, watch=watch)


def chita(
    A: Array,
    b: Array | None,
    w_bar: Array,
    k: Count,
    ridge: SupportsFloat,
    solver: Solver = "exchange",
    options: ExchangeOptions | IHTOptions | None = None,
    progress: bool | None = None,
) -> Result:
    """Choose k weights and their values: minimise ½‖b − Aw‖² + (nλ/2)‖w − w̄‖², ‖w‖₀ ≤ k.

    >>> import torch
    >>> A = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    >>> chita(A, None, torch.tensor([1.0, 2.0, 0.1]), k=2, ridge=0.1).support
    tensor([ True,  True, False])

    A: [n, p] tensor or (memory-mapped, perhaps read-only) array of float64, float32 or bfloat16; row i is the gradient
    of the mean loss over mini-batch i. b: [n], or None for Aw̄, the problem without first-order term;
    `first_order_target` gives the b with it. w_bar: [p]. Arrays will do for all three; nothing is written to. k: a
    number of weights, or a `Quota` (per layer, N:M). ridge: λ > 0.

    solver: "exchange" (the default: magnitude support, exact refit, exact exchanges), "iht" (the paper's:
    exact line search, active set, refit), or "magnitude" (magnitude support and exact refit only). progress: show a bar
    over the rounds on standard error; None: where that is a terminal.

    Raises ValueError for k outside 1 … p, λ ≤ 0 or too small for the scale of A in float64, NaN or infinity in A, b or
    w̄, shapes that do not fit, an unknown solver; TypeError for what is no tensor, array or number.
    """
    problem = Problem.of(A, b, w_bar, ridge)
    quota = quota_of(k, problem.p)
    gib = problem.A.numel() * problem.A.element_size() / 2**30
    cost = f"{quota.kept:,} of {problem.p:,} weights; each round reads A ({gib:.2f} GiB) at least once"
    with watching(progress, lambda: cost) as watch:
        return solve(problem, quota, solver, options, watch)
