"""H2SPG: phases, exact sparsity, the sign of the saliency, resuming, and what bad input gets."""

import copy
from typing import Any

import pytest
import torch
from networks import TwoBranches, Wide, equal_in_both_modes
from torch import Tensor, nn

import espalier
from espalier.errors import BudgetError, InvalidSolution, TrainingError
from espalier.saliency import State, cosine_magnitude, magnitude
from espalier.sparsify.groups import Groups


def wide(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Wide, espalier.SearchSpace, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = Wide().to(dtype)
    x, y = torch.randn(16, 6, dtype=dtype), torch.randint(0, 3, (16,))
    return model, espalier.search_space(model, (x,)), x, y


def train(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()


@pytest.mark.parametrize(
    ("base", "arguments"),
    [
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}),
        (torch.optim.Adam, {"lr": 0.01}),
        (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.9)}),
    ],
)
@pytest.mark.parametrize(
    "bound", [{"structures": 0.5}, {"params": 0.6}, {"macs": 0.4}, {"structures": 0.8, "params": 0.5}]
)
def test_ends_with_exactly_the_budget_at_zero(base: Any, arguments: dict[str, Any], bound: dict[str, float]) -> None:
    model, space, x, y = wide()
    budget = espalier.Budget(**bound)
    opt = espalier.H2SPG(space, base, budget, warmup_steps=5, projection_steps=8, **arguments)
    assert opt.phase == "warmup"
    train(model, opt, x, y, 5)
    assert opt.phase == "hybrid"
    marked = opt.redundant
    train(model, opt, x, y, 8)
    assert opt.phase == "done"
    train(model, opt, x, y, 3)
    assert opt.redundant == marked
    assert opt.zero_structures() == len(marked)
    zero = {p for name in marked for p in space[name].parameters}
    for name, p in model.named_parameters():
        assert bool((p == 0).all()) == (name in zero)
    full, cost = space.cost(), space.cost(marked)
    assert len(space) - len(marked) <= bound.get("structures", 1.0) * len(space)
    assert cost.params <= bound.get("params", 1.0) * full.params
    assert cost.macs <= bound.get("macs", 1.0) * full.macs
    solution = opt.solution()
    small = espalier.construct(space, solution)
    assert equal_in_both_modes(model, small, x)
    assert equal_in_both_modes(space.masked(solution), small, x)


def test_warm_up_and_survivors_follow_the_base_rule() -> None:
    model, space, x, y = wide()
    plain = copy.deepcopy(model)
    opt = espalier.H2SPG(
        space,
        budget=espalier.Budget(structures=0.5),
        lr=0.05,
        momentum=0.9,
        warmup_steps=4,
        projection_steps=3,
    )
    base = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    train(model, opt, x, y, 4)
    train(plain, base, x, y, 4)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: base.state[p]["momentum_buffer"].clone() for n, p in plain.named_parameters()}
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
    shrinking = {p for name in opt.redundant for p in space[name].parameters}
    for name, p in model.named_parameters():
        assert p.grad is not None
        if name in shrinking:  # y = (1 - 1/left) x - lr g, the plain rule
            expected = (1 - 1 / 3) * before[name] - 0.05 * p.grad
        else:
            expected = before[name] - 0.05 * (0.9 * buffers[name] + p.grad)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_half_space_test_equals_the_loop_over_groups() -> None:
    torch.manual_seed(3)
    model, space, _, _ = wide(3)
    opt = espalier.H2SPG(
        space,
        budget=espalier.Budget(structures=0.25),
        lr=1.0,
        warmup_steps=1,
        projection_steps=50,
        test_every=1,
        epsilon=0.3,
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pull = dict(zip(opt.redundant, torch.linspace(0.0, 1.5, len(opt.redundant)).tolist(), strict=True))
    for name, strength in pull.items():
        for parameter in space[name].parameters:
            p = model.get_parameter(parameter)
            p.grad = strength * p.detach().clone() + 0.05 * torch.randn_like(p)
    expected_zero = set()
    for name in opt.redundant:
        inner = square = 0.0
        for parameter in space[name].parameters:
            x, g = before[parameter], model.get_parameter(parameter).grad
            assert g is not None
            y = (1 - 1 / 50) * x - g
            inner += float((y * x).sum())
            square += float((x * x).sum())
        if inner < 0.3 * square:
            expected_zero.add(name)
    opt.step()
    zero = {n for n in opt.redundant if all((model.get_parameter(p) == 0).all() for p in space[n].parameters)}
    assert zero == expected_zero
    assert 0 < len(zero) < len(opt.redundant)
    for name in zero:  # and they stay so, whatever the gradient
        for parameter in space[name].parameters:
            model.get_parameter(parameter).grad = torch.ones_like(model.get_parameter(parameter))
    opt.step()
    assert all((model.get_parameter(p) == 0).all() for n in zero for p in space[n].parameters)


def test_a_group_whose_removal_lowers_the_loss_is_the_least_salient() -> None:
    """The sign of the cosine: branch a adds noise to a perfect fit by branch b."""
    torch.manual_seed(0)
    model = TwoBranches().double()
    x = torch.randn(64, 4, dtype=torch.float64)
    with torch.no_grad():
        model.a.weight.normal_(0, 0.7)
        model.b.weight.normal_(0, 0.7)
        target = model.out(model.b(x))
        model.a.bias.zero_()
    space = espalier.search_space(model, (x,))

    def loss(m: nn.Module) -> float:
        return float((m(x) - target).square().mean())

    without = {n: loss(space.masked(space.solution([n]))) for n in ("a", "b")}
    assert without["a"] < loss(model) < without["b"]
    (model(x) - target).square().mean().backward()
    groups = Groups(space)
    state = groups.state([t.grad for t in groups.tensors if t.grad is not None])
    scores = dict(zip(("a", "b"), cosine_magnitude(space, state).tolist(), strict=True))
    assert scores["a"] < scores["b"]
    opt = espalier.H2SPG(space, lr=1e-3, warmup_steps=1, projection_steps=1)
    opt.step()
    assert opt.redundant == ("a",)


def test_saliency_state_equals_the_loop() -> None:
    model, space, x, y = wide()
    nn.functional.cross_entropy(model(x), y).backward()
    groups = Groups(space)
    state = groups.state([t.grad for t in groups.tensors if t.grad is not None])
    for i, structure in enumerate(space.structures):
        pairs = [
            (p.detach().flatten(), p.grad.flatten())
            for n in structure.parameters
            if (p := model.get_parameter(n)).grad is not None
        ]
        w, g = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
        torch.testing.assert_close(state.weight_sq[i], w @ w)
        torch.testing.assert_close(state.grad_sq[i], g @ g)
        torch.testing.assert_close(state.dot[i], w @ g, rtol=1e-6, atol=1e-12)
        assert state.size[i] == w.numel()
    cosine = state.dot / (state.weight_sq * state.grad_sq).sqrt()
    size = (state.weight_sq / state.size).sqrt()
    torch.testing.assert_close(cosine_magnitude(space, state), size / size.norm() - cosine / cosine.norm())
    torch.testing.assert_close(magnitude(space, state), size)


def test_own_saliency() -> None:
    model, space, x, y = wide()

    def last_first(space: espalier.SearchSpace, state: State) -> Tensor:
        return -torch.arange(len(space), dtype=torch.float64)

    opt = espalier.H2SPG(
        space,
        budget=espalier.Budget(structures=0.75),
        lr=0.1,
        saliency=last_first,
        warmup_steps=1,
        projection_steps=2,
    )
    train(model, opt, x, y, 3)
    assert opt.redundant == tuple(s.name for s in space.structures[:-3:-1])


@pytest.mark.parametrize("stop", [2, 4, 7, 9, 12, 14])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_resumes_bit_identically_in_every_phase(stop: int, base: Any, tmp_path: Any) -> None:
    def start() -> tuple[Wide, espalier.H2SPG, torch.optim.lr_scheduler.LRScheduler, Tensor, Tensor]:
        model, space, x, y = wide(dtype=torch.float32)
        momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
        opt = espalier.H2SPG(
            space,
            base,
            espalier.Budget(structures=0.5),
            lr=0.02,
            warmup_steps=4,
            projection_steps=8,
            test_every=2,
            **momentum,
        )
        return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 15), x, y

    def go(model: nn.Module, opt: Any, schedule: Any, x: Tensor, y: Tensor, steps: int) -> None:
        for _ in range(steps):
            train(model, opt, x, y, 1)
            schedule.step()

    model, opt, schedule, x, y = start()
    go(model, opt, schedule, x, y, 15)
    first, opt1, schedule1, _, _ = start()
    go(first, opt1, schedule1, x, y, stop)
    torch.save(
        {"model": first.state_dict(), "opt": opt1.state_dict(), "schedule": schedule1.state_dict()},
        tmp_path / "c.pt",
    )
    again, opt2, schedule2, _, _ = start()
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    opt2.load_state_dict(saved["opt"])
    schedule2.load_state_dict(saved["schedule"])
    assert opt2.phase == opt1.phase
    go(again, opt2, schedule2, x, y, 15 - stop)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert opt.solution() == opt2.solution()


def test_param_groups_scaler_and_clipping() -> None:
    model, space, x, y = wide(dtype=torch.float32)
    groups = [
        {"params": list(model.branches.parameters()), "lr": 0.1},
        {"params": list(model.out.parameters()), "lr": 0.01, "weight_decay": 0.1},
    ]
    opt = espalier.H2SPG(space, params=groups, lr=0.5, momentum=0.9, warmup_steps=3, projection_steps=4)
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.01]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(8):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1.0)
        scaler.step(opt)
        scaler.update()
    assert opt.phase == "done"
    assert opt.zero_structures() == 4


def test_closure() -> None:
    model, space, x, y = wide()
    opt = espalier.H2SPG(space, lr=0.1, warmup_steps=1, projection_steps=1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert opt.step(closure) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_bad_gradients_change_nothing(value: float, steps_before: int) -> None:
    model, space, x, y = wide()
    opt = espalier.H2SPG(space, lr=0.1, momentum=0.9, warmup_steps=2, projection_steps=9)
    train(model, opt, x, y, steps_before)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    model.out.bias.grad = torch.full_like(model.out.bias, value)
    with pytest.raises(TrainingError, match=r"'out\.bias' is NaN or infinite"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert opt.state_dict()["steps_done"] == state["steps_done"]
    train(model, opt, x, y, 1)


def test_budget_that_cannot_be_met_is_said_before_training() -> None:
    _, space, _, _ = wide()
    with pytest.raises(BudgetError, match="nearest"):
        espalier.H2SPG(space, budget=espalier.Budget(params=0.01), lr=0.1)


def test_parameters_added_later() -> None:
    model, space, x, y = wide()
    opt = espalier.H2SPG(space, lr=0.1, warmup_steps=1, projection_steps=1)
    with pytest.raises(TrainingError, match="cannot be added"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    train(model, opt, x, y, 2)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(TrainingError, match=r"'extra\.weight' was added"):
        opt.solution()
    with pytest.raises(TrainingError, match="not the search space's"):
        espalier.H2SPG(space, params=list(Wide().parameters()), lr=0.1)


def test_state_of_another_space() -> None:
    _, space, _, _ = wide()
    other = espalier.search_space(TwoBranches(), (torch.randn(2, 4),))
    opt, wrong = (espalier.H2SPG(s, lr=0.1) for s in (space, other))
    with pytest.raises(TrainingError, match="another model"):
        opt.load_state_dict(wrong.state_dict())


def test_dhspg_ends_in_an_invalid_network_where_h2spg_does_not() -> None:
    torch.manual_seed(0)
    model = TwoBranches()
    x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
    space = espalier.search_space(model, (x,))
    none = espalier.Budget(structures=0.0)
    with pytest.raises(BudgetError, match="nearest"):
        espalier.H2SPG(space, budget=none, lr=0.1)
    opt = espalier.DHSPG(space, budget=none, lr=0.1, warmup_steps=1, projection_steps=2)
    train(model, opt, x, y, 3)
    with pytest.raises(InvalidSolution, match="keeps no input"):
        opt.solution()
