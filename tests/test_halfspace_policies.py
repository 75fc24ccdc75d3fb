"""HSPG, DHSPG and ProxSG+: each step against the plain loop, resuming, and what they share with H2SPG."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import TwoBranches, Wide, equal_in_both_modes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import espalier
from espalier.errors import BudgetError, InvalidSolution, TrainingError
from espalier.models import DemoNet, RegNetX, SuperResNet
from espalier.models.super_resnet import SuperStage
from espalier.sparsify.loop import HalfSpace

HALF = espalier.Budget(structures=0.5)
FAMILY: dict[str, Callable[..., HalfSpace]] = {
    "HSPG": lambda space, base=torch.optim.SGD, **more: espalier.HSPG(space, base, lam=0.5, **more),
    "DHSPG": lambda space, base=torch.optim.SGD, **more: espalier.DHSPG(space, base, HALF, **more),
    "H2SPG": lambda space, base=torch.optim.SGD, **more: espalier.H2SPG(space, base, HALF, **more),
    "ProxSG+": lambda space, base=torch.optim.SGD, **more: espalier.ProxSGPlus(space, base, HALF, lam=0.5, **more),
}


def wide(seed: int = 0) -> tuple[Wide, espalier.SearchSpace, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = Wide().double()
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randint(0, 3, (16,))
    return model, espalier.search_space(model, (x,)), x, y


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.detach().flatten() for t in tensors]).norm())


def test_hspg_equals_the_published_algorithm() -> None:
    """Plain SGD: subgradient steps, then the half-space projection group by group."""
    model, space, x, y = wide()
    lam, lr, epsilon = 0.6, 0.05, 0.2
    with torch.no_grad():
        for p in model.branches[:4].parameters():
            p.mul_(0.05)
    plain = copy.deepcopy(model)
    opt = espalier.HSPG(space, lam=lam, lr=lr, warmup_steps=3, projection_steps=20, epsilon=epsilon)
    zero: set[str] = set()
    for step in range(23):
        backward(model, x, y)
        opt.step()
        backward(plain, x, y)
        grouped = {n for s in space.structures for n in s.parameters}
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if name not in grouped and p.grad is not None:
                    p -= lr * p.grad
            for s in space.structures:
                members = [plain.get_parameter(n) for n in s.parameters]
                before = [p.detach().clone() for p in members]
                size = norm(before)
                for p, old in zip(members, before, strict=True):
                    assert p.grad is not None
                    p -= lr * (p.grad + (lam * old / size if size else 0.0))
                inner = sum(float((p * old).sum()) for p, old in zip(members, before, strict=True))
                if step >= 3 and (s.name in zero or inner < epsilon * size**2):
                    zero.add(s.name)
                    for p in members:
                        p.zero_()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert opt.phase == "done"
    assert set(opt.redundant) == zero
    assert 0 < len(zero) < len(space)
    backward(model, x, y)
    opt.step()
    assert opt.zero_structures() == len(zero)
    small = espalier.construct(space, opt.solution())
    assert equal_in_both_modes(model, small, x)


def test_hspg_has_no_budget_and_refuses_what_does_not_survive() -> None:
    torch.manual_seed(0)
    model, x, y = TwoBranches(), torch.randn(8, 4), torch.randint(0, 2, (8,))
    space = espalier.search_space(model, (x,))
    opt = espalier.HSPG(space, lam=20.0, lr=0.1, warmup_steps=1, projection_steps=30)
    for _ in range(31):
        backward(model, x, y)
        opt.step()
    with pytest.raises(InvalidSolution, match="keeps no input"):
        opt.solution()


def test_prox_sg_equals_the_loop_over_groups() -> None:
    model, space, x, y = wide()
    lam, lr = 0.7, 0.1
    opt = espalier.ProxSGPlus(space, budget=HALF, lam=lam, lr=lr, momentum=0.9, warmup_steps=2, projection_steps=9)
    arrived = back = 0
    for step in range(11):
        backward(model, x, y)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        marked = opt.redundant
        opt.step()
        for name in marked if step < 10 else ():
            parameters = space[name].parameters
            trial = [before[n] - lr * model.get_parameter(n).grad for n in parameters]  # type: ignore[operator]
            shrink = max(0.0, 1.0 - lr * lam / norm(trial))
            for n, t in zip(parameters, trial, strict=True):
                torch.testing.assert_close(model.get_parameter(n).detach(), shrink * t, rtol=1e-10, atol=1e-14)
            was = norm([before[n] for n in parameters])
            now = norm([model.get_parameter(n) for n in parameters])
            arrived += was > 0 and now == 0
            back += was == 0 and now > 0
    assert opt.phase == "done"
    assert opt.zero_structures() == len(opt.redundant) == 4
    assert all(left > 0 for left in opt.left_over().values())  # 0.07 a step is too little to arrive
    assert opt.solution().provenance["left_over"] == {n: round(v, 6) for n, v in opt.left_over().items()}
    assert arrived == back == 0


def test_a_group_under_prox_sg_may_come_back() -> None:
    model, space, x, y = wide()
    opt = espalier.ProxSGPlus(space, budget=HALF, lam=1.0, lr=1.0, warmup_steps=1, projection_steps=50)
    backward(model, x, y)
    opt.step()
    name = opt.redundant[0]
    own = [model.get_parameter(n) for n in space[name].parameters]
    seen = []
    for strength in (0.0, 2.0):
        with torch.no_grad():
            for p in own:
                p.zero_()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        own[0].grad = torch.full_like(own[0], strength)
        opt.step()
        seen.append(norm(list(own)))
    size = 2.0 * own[0].numel() ** 0.5
    assert seen == pytest.approx([0.0, size - 1.0])


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("stop", [2, 6, 13])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_resumes_bit_identically(name: str, stop: int, base: Any, tmp_path: Any) -> None:
    arguments: dict[str, Any] = {"lr": 0.02, "warmup_steps": 4, "projection_steps": 8}
    if name != "ProxSG+":
        arguments |= {"test_every": 2, "epsilon": 0.9}
    if base is torch.optim.SGD:
        arguments["momentum"] = 0.9

    def go(opt: HalfSpace, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        for _ in range(steps):
            backward(model, x, y)
            opt.step()

    model, space, x, y = wide()
    opt = FAMILY[name](space, base, **arguments)
    go(opt, model, x, y, stop)
    torch.save((model.state_dict(), opt.state_dict()), tmp_path / "c.pt")
    go(opt, model, x, y, 15 - stop)
    again, space2, _, _ = wide()
    opt2 = FAMILY[name](space2, base, **arguments)
    weights, state = torch.load(tmp_path / "c.pt", weights_only=True)
    again.load_state_dict(weights)
    opt2.load_state_dict(state)
    go(opt2, again, x, y, 15 - stop)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert opt.solution() == opt2.solution()
    assert opt.redundant == opt2.redundant
    other = next(n for n in FAMILY if n != name)
    with pytest.raises(TrainingError, match="a state of"):
        FAMILY[other](space2, base, lr=0.02).load_state_dict(state)


class NoWaiting(TorchDispatchMode):
    """Refuses every operator for which a host would wait for its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILY)
def test_a_step_never_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the ends of phases do; that all gradients are finite is asked one step later on a device."""
    model, space, x, y = wide()
    arguments: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "warmup_steps": 3, "projection_steps": 6}
    if name != "ProxSG+":
        arguments |= {"test_every": 2, "epsilon": 0.9}
    other, space2, _, _ = wide()
    at_once = FAMILY[name](space2, **arguments)  # as on a CPU, where asking costs nothing
    opt = FAMILY[name](space, **arguments)
    opt._at_once = False

    def refuse(tensor: Tensor) -> list[Any]:
        raise AssertionError("tolist")

    waits = []
    for step in range(11):
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        backward(other, x, y)
        at_once.step()
        backward(model, x, y)
        with monkeypatch.context() as patched:
            patched.setattr(opt, "_check_finite", lambda: None)
            if step in (2, 8):  # the search phase, and the last step of the hybrid phase
                opt.step()
                continue
            patched.setattr(Tensor, "tolist", refuse)
            with NoWaiting():
                opt.step()
        waits.append(opt.phase)
    assert set(waits) == {"warmup", "hybrid", "done"}


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DemoNet": lambda: DemoNet(width=0.0625),
    "RegNet": lambda: RegNetX((8, 16), (2, 2), 8, strides=(2, 2)),
    "SuperResNet": lambda: SuperResNet((SuperStage(12, 4, 2, 2), SuperStage(16, 4, 2, 2))),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_at_high_sparsity_dhspg_is_refused_and_h2spg_never(network: str) -> None:
    torch.manual_seed(1)
    model = NETWORKS[network]()
    x = torch.randn(2, 3, 32, 32)
    space = espalier.search_space(model, (x,))
    refused: dict[tuple[str, float], str] = {}
    for sparsity in (0.1, 0.5, 0.9, 1.0):
        budget = espalier.Budget(structures=1.0 - sparsity)
        opts: list[HalfSpace] = [espalier.DHSPG(space, budget=budget, lr=1e-3, warmup_steps=1, projection_steps=1)]
        for method in (espalier.H2SPG, espalier.ProxSGPlus):
            arguments: dict[str, Any] = {"budget": budget, "lr": 1e-3, "warmup_steps": 1, "projection_steps": 1}
            if budget.structures_to_remove(len(space)) <= len(space.most_removable()):
                opts.append(method(space, **arguments))
                continue
            with pytest.raises(BudgetError, match="The nearest is structures="):  # before any training
                method(space, **arguments)
        for opt in opts:
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            opt.step()
            try:
                assert space.is_valid(opt.solution().removed)
            except InvalidSolution as error:
                refused[type(opt).__name__, sparsity] = str(error)
    assert {name for name, _ in refused} == {"DHSPG"}
    assert ("DHSPG", 1.0) in refused
    assert all("keeps no input" in reason or "vanishes" in reason for reason in refused.values())
