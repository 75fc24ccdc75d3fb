"""How well the network's rectifiers tell the examples of a batch apart."""

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from espalier.errors import SpaceError
from espalier.saliency.fall import arguments, falls
from espalier.saliency.state import Saliency, State
from espalier.space.search_space import SearchSpace

aten = torch.ops.aten

_LAYERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Mish)
_FUNCTIONS = {
    getattr(aten, n).default for n in ("relu", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "elu", "mish")
}


def naswot(args: tuple[Any, ...] | torch.Tensor | None = None, kwargs: dict[str, Any] | None = None) -> Saliency:
    """A saliency: the fall of ``log det K`` when a structure is removed.

    >>> saliency = naswot(torch.randn(16, 3, 32, 32))

    ``K_ij`` is the number of rectifier units that are both on or both off for the examples i and j of the batch,
    in eval mode: Mellor et al., "Neural architecture search without training" (2021). A unit is on where the
    input of an activation (ReLU and its relatives) is positive. Eigenvalues of K below 1e-9 of the largest count as
    that, so that two examples of one code give a low score and not minus infinity. By default the batch is the
    space's example inputs; 16 examples or more tell more.

    Raises :class:`SpaceError` for a network without rectifiers.
    """

    def score(space: SearchSpace, state: State) -> torch.Tensor:
        given = arguments(space, args, kwargs)
        return falls(space, lambda network: _log_det(network, *given)).to(state.size.device)

    return score


def _log_det(network: nn.Module, args: Any, kwargs: Any) -> float:
    codes = _Codes(network.eval())
    flat = pytree.tree_leaves((args, kwargs))
    with torch.no_grad():
        codes.run(*flat, enable_io_processing=False)
    if not codes.found:
        raise SpaceError("naswot reads the rectifiers of a network (ReLU and its relatives), and here is none.")
    on = torch.cat(codes.found, 1).double()
    kernel = on @ on.T + (1.0 - on) @ (1.0 - on).T
    values = torch.linalg.eigvalsh(kernel)
    return float(values.clamp_min(1e-9 * values.max()).log().sum())


class _Codes(fx.Interpreter):
    """Runs a network and notes which units are on, [examples, units] for every rectifier."""

    def __init__(self, network: Any):
        super().__init__(network)
        self.found: list[torch.Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        layer = n.op == "call_module" and isinstance(self.module.get_submodule(str(n.target)), _LAYERS)
        if layer or n.target in _FUNCTIONS:
            self.found.append((self.env[n.args[0]] > 0).flatten(1))  # type: ignore[index]
        return super().run_node(n)
