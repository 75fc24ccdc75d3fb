"""Whether what a site says of its network holds: tried out, as the modules do not tell what lies between them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from espalier.errors import TrainingError
from espalier.sparsify.conditional import Narrowing
from espalier.sparsify.folding import folded
from espalier.sparsify.sites import Site

Run = Callable[..., Any]  # (gates, parameters and buffers, what stays along which dimension) → the network's output


def try_sites(
    model: nn.Module, sites: Sequence[Site], narrowing: Narrowing, like: Tensor, run: Run
) -> list[str] | None:
    """Compare gates that multiply with closed units at zero, and with closed units left out, site by site.

    With noise on all parameters, and half of one site's gates closed: an evaluation, and three per site. Raises
    :class:`TrainingError` where zeros differ. Returns why units cannot be left out, empty where they can; None where
    nothing was found out, as no number in the output is finite, or NaN comes in with closed gates. What is infinite,
    as masked logits are, or NaN in the full network too, need only stay so. ``like`` are the gates' parameters.
    """
    make, first, faults = torch.Generator().manual_seed(0), 0, []
    own, every = shaken(model, make), torch.ones_like(like)
    full = outputs(run(every, own))
    if not _tells(full, full):
        return None
    for site in sites:
        z = every.clone()
        z[first : first + site.count] = half_closed(site.count, make).to(z)
        first += site.count
        wanted = outputs(run(z, own))
        if not _tells(wanted, full):
            return None
        zeroed = own | folded(sites, narrowing, own, z)
        fault = partial(wrong_claim, model, site, partial(run, every, own))
        if not agree(wanted, outputs(run(every, zeroed)), full):
            raise fault("closing them does not do what putting these slices to zero does")
        if site.count > 1:
            why = _without(narrowing, z, zeroed, (wanted, full), run)
            faults += [str(fault(why))] if why else []
    return faults


def _tells(wanted: Sequence[Tensor], full: Sequence[Tensor]) -> bool:
    """Whether an output can be compared: some of it is finite, and it is NaN where the full network's is alone."""
    new = any(bool((a.isnan() & ~b.isnan()).any()) for a, b in zip(wanted, full, strict=True))
    return not new and any(bool(a.isfinite().any()) for a in wanted)


def _without(
    narrowing: Narrowing,
    z: Tensor,
    own: Mapping[str, Tensor],
    wanted: tuple[Sequence[Tensor], Sequence[Tensor]],
    run: Run,
) -> str:
    """Why the network does not compute what is wanted without the closed units; empty if it does."""
    kept = {(name, dim): at for (name, dim), at in narrowing.kept(z > 0).items() if len(at) < own[name].shape[dim]}
    parts = {part.name: part.value for part in narrowing.parameters(own, kept)}
    try:
        found = outputs(run((z > 0).to(z.dtype), dict(own) | parts, kept))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        return f"the network does not run without the closed units ({str(error).strip().partition(chr(10))[0]})"
    return "" if agree(wanted[0], found, wanted[1]) else "the network without the closed units computes something else"


def half_closed(count: int, generator: torch.Generator) -> Tensor:
    """Gates of which a random half, at least one, are 0 and the others 0.5: scaling by it does not round."""
    gates = torch.full((count,), 0.5)
    gates[torch.randperm(count, generator=generator)[: max(1, count // 2)]] = 0.0
    return gates


def shaken(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters and buffers with noise, by name, so that none is 0 or 1 by accident as in a fresh batch norm."""
    found = {name: _shaken(p.detach(), generator) for name, p in model.named_parameters()}
    return found | {name: _shaken(b.detach(), generator) for name, b in model.named_buffers()}


def _shaken(t: Tensor, generator: torch.Generator) -> Tensor:
    if not t.is_floating_point():
        return t.clone()
    if t.ndim > 1:
        fan = t[0].numel() if len(t) > 1 else 1
        return t + torch.randn(t.shape, generator=generator).to(t) / max(fan, 1) ** 0.5
    noise = torch.rand(t.shape, generator=generator).to(t) * 0.4 + 0.1
    return torch.where(t.abs() < 1e4, t * (1.0 + noise) + noise, t)  # what is positive stays so: a variance


def outputs(made: Any) -> list[Tensor]:
    """The floating tensors in what a network returns. Raises :class:`TrainingError` where there are none."""
    found = [t for t in pytree.tree_leaves(made) if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise TrainingError(
            f"the network returns a {type(made).__name__} in which no tensor is found: gates on layers need "
            "tensors, or tuples or dicts of them."
        )
    return found


def agree(wanted: Sequence[Tensor], found: Sequence[Tensor], full: Sequence[Tensor] | None = None) -> bool:
    """Equal but for rounding; what is not finite must be the same.

    Rounding is in proportion to the largest number in each tensor: of those that differ from ``full``'s, if given, so
    that a constant as large as -1e9 at masked places does not cover up all other differences.
    """
    if len(wanted) != len(found):
        return False
    return all(_close(a, b, c) for a, b, c in zip(wanted, found, full or wanted, strict=True) if a.numel() or b.numel())


def _close(wanted: Tensor, found: Tensor, full: Tensor) -> bool:
    if wanted.shape != found.shape:
        return False
    differ = (wanted != found) & ~(wanted.isnan() & found.isnan())
    if not differ.any():
        return True
    finite = wanted.isfinite()
    moved = finite & (wanted != full)
    scale = wanted[moved if moved.any() else finite].abs()
    if not len(scale):
        return False
    return bool((wanted - found)[differ].abs().amax() <= torch.finfo(wanted.dtype).eps ** 0.4 * scale.amax())


def wrong_claim(model: nn.Module, site: Site, run: Callable[[], Any], why: str) -> TrainingError:
    """The error for a site whose units do not go as it says; ``run`` evaluates the network once more."""
    others = list(dict.fromkeys(s.parameter.rpartition(".")[0] for s in site.slices))
    others = [name for name in others if name != site.layer]
    if not others:
        said, lies = f"gates '{site.name}' on the {site.side} of '{site.layer}'", ""
    else:
        named = ", ".join(f"'{name}'" for name in others)
        role = f"made by {named} for it alone" if site.side == "input" else f"read by {named} alone"
        said = f"gates '{site.name}' on the {site.side} of '{site.layer}', said to be {role}"
        first, last = (others, [site.layer]) if site.side == "input" else ([site.layer], others)
        found = between(model, first, last, run)
        lies = f" Between them: {', '.join(found)}." if found else " Nothing lies between them."
    return TrainingError(
        f"{said}: {why}.{lies} {_MAY_LIE[site.side]} lie between, and no other layer may read these units. Take "
        "SpaceGates over espalier.search_space(model, ...), which follows other operations; or name every layer that "
        "reads them (consumers=)."
    )


_MAY_LIE = {
    "input": "Only operations on each unit by itself (activations, dropout, pooling; no norm or addition) may",
    "output": "Only what keeps a zero unit zero (ReLU, tanh, dropout, pooling; no norm, sigmoid or addition) may",
}


def between(model: nn.Module, first: Sequence[str], last: Sequence[str], run: Callable[[], Any]) -> list[str]:
    """What runs after the first layers and before the last: layers by their paths, functions by their names."""
    names = {m: name for name, m in model.named_modules() if name and not list(m.children())}
    ends = {model.get_submodule(name) for name in (*first, *last)}
    waiting = {model.get_submodule(name) for name in last}
    found: dict[str, None] = {}
    inside: list[nn.Module] = []
    started: list[bool] = []

    def enter(module: nn.Module, args: Any) -> None:
        waiting.discard(module)
        if started and waiting and module not in ends and not inside:
            found[f"'{names[module]}' ({type(module).__name__})"] = None
        inside.append(module)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        inside.pop()
        if module in ends:
            started.append(True)

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if started and waiting and not inside and isinstance(out, Tensor):
                name = (resolve_name(func) or "").removeprefix("torch.")
                found.update({} if name.endswith("__get__") else {name: None})
            return out

    with ExitStack() as stack:
        for module in {*names, *ends}:
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(Functions())
        run()
    return list(found)
