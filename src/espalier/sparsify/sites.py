"""Where gates sit: on the inputs or outputs of named layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from espalier.errors import TrainingError
from espalier.space.structure import Slices


@dataclass(frozen=True, eq=False)
class Site:
    """Gates of one place.

    ``layer`` is the dotted path of the layer whose ``side`` ("input" or "output") is multiplied by ``count``
    gates, and ``size`` the weights behind each (|g| in Eq. 17). ``scaled`` are the layer's own parameters
    that a kept gate may be folded into; ``slices`` all parameters that go when a gate closes. ``narrow``: a
    closed gate's unit need not even be computed by the layer before, so that the layer's input arrives narrow
    in conditional computation.
    """

    name: str
    layer: str
    side: str
    count: int
    size: float
    scaled: tuple[Slices, ...]
    slices: tuple[Slices, ...]
    narrow: bool = True


def input_gates(model: nn.Module, layer: str, producer: str | None = None, name: str = "") -> Site:
    """One gate per input feature of a linear layer (or input channel of a convolution).

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> input_gates(model, "2", producer="0").count
    3

    ``producer`` is the layer whose outputs these are, read by this layer alone, with nothing between but
    operations on each unit by itself (activations, dropout, pooling): its rows then go with the gates.
    Without one, the layer alone narrows. The first ``gates(x)`` tries this out, and refuses where it does not hold.
    Raises :class:`TrainingError` for a layer that does not exist, is not linear or convolutional, has no weight of
    its own, is frozen or does not fit its producer.
    """
    target, weight = _weight(model, layer)
    count = weight.shape[1]
    _check_ungrouped(target, layer)
    owner = torch.arange(count)
    scaled = (Slices(f"{layer}.weight", 1, owner),)
    above = ()
    if producer is not None:
        above = _rows(model, producer, owner)
    return Site(
        name or layer,
        layer,
        "input",
        count,
        weight.numel() / count,
        scaled,
        scaled + above,
        producer is not None,
    )


def output_gates(model: nn.Module, layer: str, consumers: Sequence[str] = (), name: str = "") -> Site:
    """One gate per output channel (filter) of a convolution, or neuron of a linear layer.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> output_gates(model, "0", consumers=["2"]).slices[-1].owner[:6].tolist()
    [0, 0, 0, 0, 1, 1]

    ``consumers`` are all layers that read them, with nothing between but operations that keep a zero unit zero
    (ReLU, tanh, GELU, dropout, pooling; no norm, sigmoid or residual addition): their columns go too, a block of equal
    size per channel where the channels are flattened. Without any, the network keeps its shape (no ``sliced``, no
    conditional computation). Raises :class:`TrainingError` as :func:`input_gates` does.
    """
    if isinstance(consumers, str):
        raise TrainingError(f"consumers is a list of layers: consumers=['{consumers}'].")
    _, weight = _weight(model, layer)
    count = weight.shape[0]
    owner = torch.arange(count)
    own = _rows(model, layer, owner)
    below = []
    for consumer in consumers:
        reader, other = _weight(model, consumer)
        _check_ungrouped(reader, consumer)
        block, rest = divmod(other.shape[1], count)
        if rest:
            raise TrainingError(
                f"'{consumer}' reads {other.shape[1]} features, no multiple of the {count} of '{layer}'."
            )
        below.append(Slices(f"{consumer}.weight", 1, owner.repeat_interleave(block)))
    return Site(name or layer, layer, "output", count, weight.numel() / count, own, (*own, *below))


def checked_sites(model: nn.Module, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites. Raises :class:`TrainingError` for those that cannot be gated together, or not in this model."""
    if isinstance(sites, Site):
        raise TrainingError(f"sites is one site, '{sites.name}', and no list: give [input_gates(...), ...].")
    sites = tuple(sites)
    if not sites:
        raise TrainingError("there is nothing to gate: sites is empty.")
    wrong = next((site for site in sites if not isinstance(site, Site)), None)
    if wrong is not None:
        raise TrainingError(
            f"{wrong!r} is no site: make sites with input_gates(model, ...) or output_gates(model, ...)."
        )
    twice = _twice(site.name for site in sites)
    if twice is not None:
        raise TrainingError(
            f"two sites are called '{twice}': give one of them another name, input_gates(..., name='...')."
        )
    same = _twice((site.layer, site.side) for site in sites)
    if same is not None:
        layer, side = same
        raise TrainingError(f"two sites gate the {side} of '{layer}': both would multiply. Keep one of them.")
    own = dict(model.named_parameters())
    for site in sites:
        _check_own(site, own)
        if not any(own[s.parameter].requires_grad for s in site.slices):
            raise TrainingError(
                f"'{site.name}' is frozen (requires_grad=False): its gates would have nothing to train."
            )
    return sites


def _check_own(site: Site, own: Mapping[str, torch.Tensor]) -> None:
    for s in site.slices:
        if s.dim is None or s.owner is None:
            continue
        if s.parameter not in own or own[s.parameter].ndim <= s.dim or own[s.parameter].shape[s.dim] != len(s.owner):
            there = f"is {list(own[s.parameter].shape)}" if s.parameter in own else "is missing"
            raise TrainingError(
                f"site '{site.name}' is of another model: in this one '{s.parameter}' {there}. Make the site with "
                "input_gates(model, ...) or output_gates(model, ...) of the model that you give to Gates."
            )


def _twice(keys: Iterable[Any]) -> Any:
    """The first that comes twice."""
    seen: set[Any] = set()
    return next((key for key in keys if key in seen or seen.add(key)), None)


def _rows(model: nn.Module, layer: str, owner: torch.Tensor) -> tuple[Slices, ...]:
    target, weight = _weight(model, layer)
    if len(weight) != len(owner):
        raise TrainingError(f"'{layer}' makes {len(weight)} features, but there are {len(owner)} gates.")
    bias = getattr(target, "bias", None)
    return (
        Slices(f"{layer}.weight", 0, owner),
        *((Slices(f"{layer}.bias", 0, owner),) if bias is not None else ()),
    )


def _check_ungrouped(layer: nn.Module, name: str) -> None:
    if getattr(layer, "groups", 1) != 1:
        raise TrainingError(f"'{name}' is a grouped convolution: its inputs cannot be gated one by one.")


def _weight(model: nn.Module, layer: str) -> tuple[nn.Module, torch.Tensor]:
    modules = dict(model.named_modules())
    if layer not in modules:
        raise TrainingError(f"no layer is called '{layer}'; there are: {', '.join(n for n in modules if n)}.")
    target = modules[layer]
    if not isinstance(target, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TrainingError(
            f"'{layer}' is a {type(target).__name__}: gates sit on linear and (not transposed) convolutional layers."
        )
    weight = dict(model.named_parameters()).get(f"{layer}.weight")
    if weight is None:
        raise TrainingError(
            f"'{layer}' has no weight of its own: it is computed (weight or spectral norm) or shared with a layer "
            "before it. Take SpaceGates over a search space."
        )
    if not weight.requires_grad:
        raise TrainingError(f"'{layer}' is frozen (requires_grad=False): gates on it would have nothing to train with.")
    return target, weight
