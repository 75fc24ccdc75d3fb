"""The same search over any model: GS-NAS where the space is what espalier finds in it."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from espalier.data import Batches
from espalier.errors import SpaceError
from espalier.nas.group_search import GroupSearch, GroupSettings
from espalier.nas.loop import Folder, advance
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.sparsify.bisect import bisect_mu


def search_model(
    space: SearchSpace,
    batches: Batches,
    steps: int,
    folder: Folder,
    params: float = 0.0,
    settings: GroupSettings | None = None,
    key: Callable[[str], str] | None = None,
    trials: int = 5,
    tolerance: float = 0.05,
    seed: int = 0,
) -> Solution:
    """Search any model as GS-NAS searches cells: pruning and architecture search are one.

    >>> import tempfile
    >>> import torch
    >>> from espalier import construct, search_space
    >>> from espalier.data import load
    >>> from espalier.models import DemoNet
    >>> model = DemoNet(width=0.25, in_channels=1)
    >>> space = search_space(model, (torch.randn(2, 1, 8, 8),))
    >>> batches = Batches(load("digits", "train"), 64)
    >>> solution = search_model(space, batches, 4, Folder(tempfile.mkdtemp()))
    >>> _ = construct(space, solution)

    Structures whose names have the same ``key`` are one group and go together or not at all. With ``params``,
    the fraction of the parameters that may stay, μ is bisected over at most ``trials`` trainings of ``steps``
    steps each; else ``settings.mu`` is used as it is. The model ends with the best training's weights, what
    was removed at zero. Stopped, it goes on in ``folder``.

    Returns the solution; ``espalier.construct`` makes the network. Raises :class:`SpaceError` where no
    training found anything that works.
    """
    model, settings = space.model, settings or GroupSettings(mu=0.05)
    first = copy.deepcopy(model.state_dict())
    full, count = space.cost().params, 0

    def train(mu: float, state: Mapping[str, Any] | None) -> tuple[float, Mapping[str, Any]]:
        nonlocal count
        part, count = folder.below(f"trial-{count:02d}"), count + 1
        model.load_state_dict(first)
        batches.load_state_dict({"seed": seed, "epoch": 0, "batch": 0})
        search = GroupSearch(model, batches, replace(settings, mu=mu), steps, seed, space=space, key=key)
        if state is not None:
            search.start_from(state)
        advance(search, part)
        search.opt.snap(settings.patience)
        solution = search.opt.solution(patience=settings.patience)
        share = space.cost(solution.removed).params / full
        folder.tell({"trial": count, "mu": mu, "removed": len(solution.removed), "params": round(share, 4)})
        ended = {k: v for k, v in search.state_dict().items() if k in ("removed", "model", "optimizer")}
        return share, {**copy.deepcopy(ended), "solution": solution}

    if params:
        bisection = bisect_mu(train, params, settings.mu, tolerance=min(tolerance, params), max_trials=trials)
        ended = bisection.best.state
    else:
        ended = train(settings.mu, None)[1]
    model.load_state_dict(ended["model"])
    solution: Solution = ended["solution"]
    if not space.is_valid(solution.removed):
        raise SpaceError("the search left no working network: lower mu.")
    return solution
