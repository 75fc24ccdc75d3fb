"""Norms and means over gated channels in half precision: as exact as torch's own, where sums leave its range."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier import construct, search_space
from espalier.sparsify import SpaceGates

HALVES = pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


class Normed(nn.Module):
    """Channels of a layer of a large output, averaged over."""

    def __init__(self, norm: Callable[[Tensor], Tensor] | nn.Module, scale: float, images: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 64, 3, padding=1) if images else nn.Linear(8, 64)
        self.b = nn.Conv2d(64, 2, 1) if images else nn.Linear(64, 4)
        self.norm, self.images = norm, images
        with torch.no_grad():
            self.a.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.norm(self.a(x)))
        return y.mean((2, 3)) if self.images else y


def centred(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / 64


NETWORKS: dict[str, Callable[[], Normed]] = {
    "group norm": lambda: Normed(nn.GroupNorm(4, 64), 5.0, images=True),
    "functional group norm": lambda: Normed(lambda x: F.group_norm(x, 4), 5.0, images=True),
    "layer norm": lambda: Normed(nn.LayerNorm(64), 800.0),
    "functional layer norm": lambda: Normed(lambda x: F.layer_norm(x, (64,)), 800.0),
    "rms norm": lambda: Normed(nn.RMSNorm(64), 800.0),
    "rms norm, small": lambda: Normed(nn.RMSNorm(64, elementwise_affine=False), 1e-3),
    "mean": lambda: Normed(centred, 800.0),
}


def setting(name: str) -> tuple[Normed, Tensor]:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    with torch.no_grad():
        model.a.bias.fill_(100.0 if name == "mean" else 0.0)  # a sum that float16 does not reach: 64 · 1500
        if name == "mean":
            model.a.weight.copy_(model.a.weight.abs())
    x = torch.randn(2, 3, 64, 64) if model.images else torch.randn(6, 8)
    return model.eval(), x.abs() if name == "mean" else x


def error(y: Tensor, true: Tensor) -> float:
    return (y.double() - true).abs().max().item()


@HALVES
@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_open_gates_are_as_exact_as_the_model(name: str, pure: bool, kind: torch.dtype) -> None:
    model, x = setting(name)
    if pure:
        model, x = model.to(kind), x.to(kind)
    gates = SpaceGates(search_space(model, x, levels=("channel",)))
    gates._z = torch.ones(len(gates.phi))
    with torch.autocast("cpu", kind, enabled=not pure):
        own, gated = model(x), gates(x)
    true = model.float()(x.float()).double()
    assert gated.dtype == own.dtype
    assert error(gated, true) <= 1.5 * error(own, true) + 1e-3 * true.abs().max().item()


@HALVES
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_closed_gates_are_as_exact_as_the_constructed_network(name: str, kind: torch.dtype) -> None:
    model, x = setting(name)
    space = search_space(model, x, levels=("channel",))
    gates = SpaceGates(space)
    gates.phi.copy_(torch.where(torch.arange(len(gates.phi)) % 4 < 2, 2.0, -2.0))
    single, solution = gates(x), gates.solution()
    assert len(solution.removed) == len(gates.phi) // 2
    with torch.autocast("cpu", kind):
        gated = gates(x)
    gates.finish()
    small = construct(space, solution)
    with torch.autocast("cpu", kind):
        own = small(x)
    true = small(x).double()
    assert error(single, true) <= 1e-4 * true.abs().max().item()
    assert error(gated, true) <= 1.5 * error(own, true) + 1e-3 * true.abs().max().item()


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_in_half_precision_are_finite_and_right(name: str) -> None:
    model, x = setting(name)
    gates = SpaceGates(search_space(model, x, levels=("channel",)))
    gates._z = (torch.arange(len(gates.phi)) % 4 < 2).float()
    found = []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            gates(x).float().square().sum().backward()
        found.append(model.b.weight.grad.clone())
    assert error(found[1], found[0].double()) <= 0.05 * found[0].abs().max().item()
