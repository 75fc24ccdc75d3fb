"""The penalty's weight μ found automatically: a target of structures, parameters or MACs."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from espalier.errors import SpaceError
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.sparsify.flat import FlatProximal
from espalier.sparsify.penalised import first_weights

S = TypeVar("S")


@dataclass(frozen=True)
class Trial(Generic[S]):
    """One training run: its μ, what stayed (a fraction), and its state, from which the next may start."""

    mu: float
    share: float
    state: S = field(repr=False)


@dataclass(frozen=True)
class Bisection(Generic[S]):
    """All trials in order, and the best: nearest to the target among those within it, else nearest at all."""

    trials: tuple[Trial[S], ...]
    best: Trial[S]
    met: bool


def bisect_mu(
    train: Callable[[float, S | None], tuple[float, S]],
    target: float,
    mu: float,
    *,
    tolerance: float = 0.02,
    max_trials: int = 20,
    factor: float = 4.0,
    warm_start: bool = True,
) -> Bisection[S]:
    """Find μ so that at most ``target`` stays, and at least ``target - tolerance``.

    >>> result = bisect_mu(lambda mu, state: (1 / (1 + mu), None), target=0.5, mu=0.01)
    >>> result.met, 0.48 <= result.best.share <= 0.5
    (True, True)

    ``train(mu, state)`` trains, from ``state`` where one is given, and returns the fraction that stays (of
    structures, parameters or MACs) and its own state. The first trials multiply or divide μ by ``factor``
    until the target is bracketed; then the bracket is halved, in log μ. With ``warm_start`` a trial starts
    from the state of the nearest trial with a smaller μ (a larger network: what is zero rarely revives). What
    stays need not fall with μ: a trial that contradicts the bracket becomes its new end, a bracket that
    closes on a jump is opened upwards, and the best trial is kept whatever happens later. A warm start trains on, and
    may thereby jump over the target whatever μ is: after a first jump every trial starts afresh, from the same μ.

    Raises ValueError for a target or tolerance outside [0, 1] and for μ <= 0.
    """
    if not 0.0 <= target <= 1.0 or not 0.0 <= tolerance <= 1.0 or mu <= 0.0 or factor <= 1.0 or max_trials < 1:
        raise ValueError("target and tolerance lie in [0, 1], mu is positive, factor above 1, max_trials at least 1.")
    trials: list[Trial[S]] = []
    low: float | None = None  # too much stays
    high: float | None = None  # within the target
    warm = warm_start
    for _ in range(max_trials):
        before = [t for t in trials if t.mu <= mu] if warm else []
        start = max(before, key=lambda t: t.mu).state if before else None
        share, state = train(mu, start)
        trials.append(Trial(mu, share, state))
        if target - tolerance <= share <= target:
            break
        if share > target:
            low = mu
            high = None if high is not None and high <= mu else high
        else:
            high = mu
            low = None if low is not None and low >= mu else low
        if warm and low is not None and high is not None and high / low < 1.1:
            mu, low, high, warm = high, None, None, False  # where fresh starts cross is open again, on both sides
            continue
        if low is not None and high is not None and high / low < 1.005:
            low, high = high, None  # a jump, not a crossing: look for another beyond it
        if low is None and high is not None:
            mu = high / factor
        elif high is None and low is not None:
            mu = low * factor
        elif low is not None and high is not None:
            mu = math.sqrt(low * high)
    within = [t for t in trials if t.share <= target]
    best = min(within or trials, key=lambda t: abs(t.share - target))
    return Bisection(tuple(trials), best, target - tolerance <= best.share <= target)


@dataclass(frozen=True)
class Fitted:
    """What one training run left: the model's state with dead groups at zero, and the solution."""

    weights: dict[str, Tensor] = field(repr=False)
    solution: Solution


def kept_share(space: SearchSpace, solution: Solution, of: str = "macs") -> float:
    """The fraction of "structures", "params" or "macs" that the constructed network keeps.

    >>> import torch
    >>> from espalier import search_space
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> space = search_space(model, torch.randn(3, 4), levels=("channel",))
    >>> kept_share(space, space.solution(["0[0]", "0[1]"]), "structures")
    0.75
    """
    if of not in ("structures", "params", "macs"):
        raise SpaceError(f"of='{of}': there are structures, params and macs.")
    if of == "structures":
        return 1.0 - len(solution.removed) / len(space)
    left, full = space.reachable_cost(solution.removed), space.reachable_cost(())
    return getattr(left, of) / getattr(full, of)


def fit_to_target(
    space: SearchSpace,
    fit: Callable[[float], FlatProximal],
    target: float,
    *,
    of: str = "macs",
    mu: float = 1e-3,
    tolerance: float = 0.02,
    max_trials: int = 20,
    factor: float = 4.0,
    warm_start: bool = True,
) -> Bisection[Fitted]:
    """Find μ so that at most ``target`` of the structures, parameters or MACs stays, by :func:`bisect_mu`.

    >>> import torch
    >>> from espalier import search_space
    >>> from espalier.sparsify import ProxSGD, space_groups
    >>> from torch import nn
    >>> model, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(64, 4)
    >>> space = search_space(model, x, levels=("channel",))
    >>> def fit(mu):
    ...     opt = ProxSGD(space_groups(space), mu, lr=0.1, rho=0.5)
    ...     for _ in range(100):
    ...         opt.zero_grad()
    ...         (model(x)[:, 0] - x.square().sum(1)).square().mean().backward()
    ...         opt.step()
    ...     return opt
    >>> found = fit_to_target(space, fit, 0.6, of="params", mu=0.1, tolerance=0.2)
    >>> found.met and 0.4 <= kept_share(space, found.best.state.solution, "params") <= 0.6
    True

    ``fit(mu)`` trains ``space.model`` in place, from the weights that it finds there, and returns its optimizer, whose
    groups are the space's. Every trial starts from the model as given, or with ``warm_start`` from the trial with
    the next smaller μ; ``normalize="init"`` goes by the norms of the model as given in either case. In the end the
    model holds the best trial's weights, dead groups at zero, and
    ``best.state.solution`` is its solution. Other arguments and errors as of :func:`bisect_mu`.
    """
    model = space.model
    initial = {name: t.clone() for name, t in model.state_dict().items()}

    def train(value: float, state: Fitted | None) -> tuple[float, Fitted]:
        model.load_state_dict(initial if state is None else state.weights)
        with first_weights(model, initial):
            optimizer = fit(value)
        optimizer.snap()
        solution = optimizer.solution(space)
        weights = {name: t.clone() for name, t in model.state_dict().items()}
        return kept_share(space, solution, of), Fitted(weights, solution)

    found = bisect_mu(
        train, target, mu, tolerance=tolerance, max_trials=max_trials, factor=factor, warm_start=warm_start
    )
    model.load_state_dict(found.best.state.weights)
    return found


def search(
    objective: Callable[[float, float, float], float],
    *,
    trials: int = 20,
    storage: str | None = None,
    name: str = "proxsgd",
    mu: tuple[float, float] = (1e-5, 1.0),
    lr: tuple[float, float] = (1e-4, 1e-1),
    rho: tuple[float, float] = (0.05, 1.0),
    seed: int = 0,
) -> Any:
    """Minimise ``objective(mu, lr, rho)`` with optuna; a study in ``storage`` goes on where it stopped.

    ``storage`` is optuna's, "sqlite:///search.db" for one. Returns the optuna study, with ``trials`` finished
    trials in all. An objective of nan, as after a training that diverged, does not count as finished; a call makes at
    most ``trials`` further attempts for such ones and warns if that was not enough. Raises ImportError, naming the
    extra to install, without optuna.
    """
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("a search over mu, lr and rho needs optuna: pip install 'espalier[search]'") from None
    study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))  # resumed: not the same draws again

    def one(trial: Any) -> float:
        return objective(
            trial.suggest_float("mu", *mu, log=True),
            trial.suggest_float("lr", *lr, log=True),
            trial.suggest_float("rho", *rho),
        )

    def missing() -> int:
        return max(0, trials - sum(t.state == optuna.trial.TrialState.COMPLETE for t in study.trials))

    attempts = missing() + trials
    while 0 < missing() <= attempts:
        attempts -= missing()
        study.optimize(one, n_trials=missing())
    if missing():
        warnings.warn(f"{missing()} of {trials} trials did not finish: too many objectives were nan.", stacklevel=2)
    return study
