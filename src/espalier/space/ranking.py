"""Rankings that compare scores within families, or among families of one shape, instead of everywhere."""

from collections.abc import Sequence

import numpy as np

from espalier.space.knapsack import Choice, Knapsack
from espalier.space.structure import Family

RANKINGS = ("global", "local", "isomorphic")
HALVINGS = 40


def ranked(problem: Knapsack, scores: np.ndarray, ranking: str) -> Choice | None:
    """The largest fraction that fits, kept of every family or of every group of families; None if none fits."""
    coefficients = problem.coefficients(())
    groups = _groups(problem.families, ranking)
    low, high = 0.0, 1.0
    kept = _kept(problem, scores, groups, low)
    if not problem.fits(problem.used(kept, (), coefficients)):
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        trial = _kept(problem, scores, groups, middle)
        if problem.fits(problem.used(trial, (), coefficients)):
            low, kept = middle, trial
        else:
            high = middle
    kept = _one_more(problem, kept, coefficients)
    return Choice(kept, (), float(problem.value(kept, ())))


def _groups(families: Sequence[Family], ranking: str) -> list[list[int]]:
    """Families whose scores are compared with one another."""
    found: dict[object, list[int]] = {}
    for k, family in enumerate(families):
        if family.level == "segment":
            continue
        shape = (family.level, family.count, len(family.slices), len(family.readers))
        found.setdefault(k if ranking == "local" else shape, []).append(k)
    return list(found.values())


def _kept(problem: Knapsack, scores: np.ndarray, groups: list[list[int]], fraction: float) -> np.ndarray:
    """How many of the best ``fraction`` of each group's structures each of its families has."""
    widths, starts = problem.widths, np.cumsum([0, *problem.widths.full])
    kept = widths.start.copy()
    for group in groups:
        pooled = np.concatenate([scores[starts[k] : starts[k + 1]] for k in group])
        owner = np.repeat(group, [widths.full[k] for k in group])
        best = owner[np.argsort(-pooled, kind="stable")[: round(fraction * len(pooled))]]
        kept[group] = np.bincount(best, minlength=len(widths.full))[group]
    return np.minimum(widths.at_most(kept), widths.start)


def _one_more(problem: Knapsack, kept: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """One step up for every family that has room for it, the most saliency first: the fraction is met to one step."""
    up = problem.widths.higher(kept)
    gained = problem.widths.values(up) - problem.widths.values(kept)
    for k in np.argsort(-gained, kind="stable"):
        trial = kept.copy()
        trial[k] = up[k]
        if problem.fits(problem.used(trial, (), coefficients)):
            kept = trial
    return kept
