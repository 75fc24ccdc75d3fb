"""What the proximal optimizers refuse: values out of their ranges, keys, parameters and gradients."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify.grouping import Grouping

WHOLE = {"mu", "tau", "normalize", "exponent", "schedule", "beta", "delta", "epsilon", "momentum"}
FREE = {"params", "param_names", "name", "initial_lr"}  # what torch, its schedulers and readers put there


def at_least_zero(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number that is not negative."""
    if not 0.0 <= value < float("inf"):
        raise TrainingError(f"{name}={value}: at least 0, and finite.")


def in_unit_interval(name: str, value: float, zero: bool = False) -> None:
    """Raise unless ``value`` lies in (0, 1], or in [0, 1] with ``zero``."""
    if not (0.0 <= value <= 1.0 if zero else 0.0 < value <= 1.0):
        raise TrainingError(f"{name} = {value}: lies in {'[' if zero else '('}0, 1].")


def squarable(dtype: torch.dtype) -> float:
    """The largest gradient of which running sums of squares stay finite.

    >>> squarable(torch.float32) < 1.9e16
    True
    """
    return 1e-3 * torch.finfo(dtype).max ** 0.5


def refuse_keys(unknown: set[str], method: str, known: Iterable[str]) -> None:
    """Raise for keys of a parameter group that nothing reads."""
    if unknown:
        raise TrainingError(
            f"'{min(unknown)}' in params= or param_groups: {method} takes {', '.join(known)} there. All else is one "
            "for all parameters: an argument of the optimizer (opt.mu = ... changes mu later)."
        )


def refuse_parameters(grouping: Grouping, trained: Mapping[str, nn.Parameter]) -> None:
    """Raise for a group's parameter that is not ``trained``, and for complex ones."""
    missing = [name for name, owner in grouping.owner.items() if name not in trained and bool((owner >= 0).any())]
    if missing:
        name, layers = missing[0], list(dict.fromkeys(m.rpartition(".")[0] or m for m in missing))
        frozen = not dict(grouping.model.named_parameters())[name].requires_grad
        group = grouping.names[int(grouping.owner[name].max())]
        without = f"{layers[:8]}{'' if len(layers) <= 8 else ' and more'}"
        how = f"search_space(..., keep={without})" if grouping.space else f"layers= or named groups without {without}"
        raise TrainingError(
            f"'{name}' ({len(missing)} such in all) belongs to a group, such as '{group}', but is "
            f"{'frozen (requires_grad=False)' if frozen else 'not in params='}, and a group is trained as a whole. "
            f"Make groups without it ({how}), or {'unfreeze it' if frozen else 'add it to params='}."
        )
    for name, p in trained.items():
        if p.is_complex():
            raise TrainingError(
                f"'{name}' is complex, and the penalties are of real numbers: let the model keep its real and "
                "imaginary parts (torch.view_as_real) as one real parameter."
            )
    if len({p.device for p in trained.values()}) > 1:
        raise TrainingError("the parameters lie on several devices: the groups' norms need one.")


def refuse_gradients(gradients: Mapping[str, Tensor], largest: float, step: int) -> None:
    """Raise for a gradient with an element that is no number up to ``largest``."""
    bad = [name for name, g in gradients.items() if not bool((g.abs() <= largest).all())]
    if bad:
        most = float(gradients[bad[0]].abs().max())
        huge = f"reaches {most:.3g}, too large for squares of it to be summed up,"
        raise TrainingError(
            f"the gradient of '{bad[0]}' {huge if most < float('inf') else 'is NaN or infinite'} at step {step} "
            f"({len(bad)} parameters in all); nothing was updated. Lower the learning rate or clip the gradients."
        )
