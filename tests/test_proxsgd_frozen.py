"""What the proximal optimizers do with frozen parameters, and what they refuse in params=."""

import copy

import pytest
import torch
from test_proxsgd import backward, net, perceptron, train
from torch import nn

from espalier import construct, search_space
from espalier.errors import TrainingError
from espalier.sparsify import RAMDA, RMDA, ProxSGD, layer_groups, named_groups, space_groups

KINDS = [ProxSGD, RMDA, RAMDA]
pytestmark = pytest.mark.filterwarnings("ignore:.*bound to be zeroed")


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Frozen while it trains.


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("more", [{}, {"tau": "adaptive"}, {"weight_decay": 0.1}, {"low": -0.2, "high": 0.2}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_frozen_later_holds_still_and_does_not_count_as_zero(kind, more, waits):
    model = perceptron()
    if kind is not ProxSGD:
        more = {k: v for k, v in more.items() if k != "tau"}
    opt = kind(layer_groups(model, ["0"]), mu=0.05, lr=0.1, **more)
    opt._waits = waits
    train(model, opt, 10)
    memory = [t[: model[0].weight.numel()].clone() for t in opt._memory()]
    model[0].requires_grad_(False)
    first, last = weights(model[0]), weights(model[2])
    train(model, opt, 50)
    assert same(first, weights(model[0]))
    assert not same(last, weights(model[2]))
    assert opt.zero_groups() == []
    assert same(memory, [t[: model[0].weight.numel()] for t in opt._memory()])
    model[0].requires_grad_(True)
    train(model, opt, 1)
    assert not same(first, weights(model[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_trains_as_if_the_frozen_layer_were_not_there(kind):
    model, twin = perceptron(), perceptron()
    groups = [named_groups(m, {"last": ["2.weight", "2.bias"], "first": ["0.weight", "0.bias"]}) for m in (model, twin)]
    opt = kind(groups[0], mu=0.02, lr=0.1, params=model.parameters())
    model[0].requires_grad_(False), twin[0].requires_grad_(False)
    alone = kind(named_groups(twin, {"last": ["2.weight", "2.bias"]}), mu=0.02, lr=0.1)
    train(model, opt, 20), train(twin, alone, 20)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-12, atol=1e-14)


def test_a_gradient_left_from_before_moves_nothing():
    model = perceptron()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.05, lr=0.1)
    train(model, opt, 3)
    model[0].requires_grad_(False)
    model[0].weight.grad[0, 0] = float("nan")
    before = weights(model[0])
    opt.step()
    assert same(before, weights(model[0]))


def test_a_frozen_group_at_zero_counts_as_zero():
    model = perceptron()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.05, lr=0.05, rho=0.5)
    train(model, opt, 300)
    zero = opt.snap()
    assert 0 < len(zero) < 20
    model[0].requires_grad_(False)
    train(model, opt, 3)
    assert opt.zero_groups() == zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_frozen_layer_holds_still_in_any_precision(dtype):
    model = perceptron().to(dtype)
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.05, lr=0.1)
    for i in range(12):
        model[0].requires_grad_(i < 4)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        before = weights(model[0])
        opt.step()
        assert same(before, weights(model[0])) == (i >= 4)


def test_freezing_and_thawing_goes_on_from_a_saved_state():
    model = net()
    opt = ProxSGD(layer_groups(model, ["0", "3"]), mu=0.01, lr=0.05)

    def run(model, opt, stages):
        for frozen in stages:
            model[3].requires_grad_(not frozen)
            backward(model), opt.step()

    run(model, opt, [False, True, True])
    twin, other = copy.deepcopy((model, opt))
    third = ProxSGD(layer_groups(rest := copy.deepcopy(model), ["0", "3"]), mu=0.01, lr=0.05, params=rest.parameters())
    third.load_state_dict(opt.state_dict())
    for pair in ((model, opt), (twin, other), (rest, third)):
        run(*pair, [True, False, False])
    assert same(weights(model), weights(twin))
    assert same(weights(model), weights(rest))


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_frozen_in_part_stops_the_step(kind):
    model, x = normed(), torch.randn(4, 3, 8, 8)
    opt = kind(space_groups(search_space(model, x, levels=("channel",))), mu=0.01, lr=0.1)
    model[1].weight.requires_grad_(False)
    model(x).sum().backward()
    before = weights(model)
    message = r"'1.weight' is frozen .*, but '0.weight', of the same group '0\[0\]', is not.*Freeze '0.weight' too"
    with pytest.raises(TrainingError, match=message):
        opt.step()
    assert same(before, weights(model))
    with pytest.raises(TrainingError, match=message):
        kind(opt.grouping, mu=0.01, lr=0.1, params=model.parameters())


# Frozen from the start.


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def test_a_frozen_norm_is_refused_and_the_way_out_works():
    model, x = normed(), torch.randn(4, 3, 8, 8)
    model[1].requires_grad_(False)
    space = search_space(model, x, levels=("channel",))
    told = r"'1.weight' \(2 such in all\) .* group, such as '0\[7\]', but is frozen.*keep=\['1'\]\)\), or unfree"
    with pytest.raises(TrainingError, match=told):
        ProxSGD(space_groups(space), mu=0.01)
    space = search_space(model, x, levels=("channel",), keep=["1"])
    opt = ProxSGD(space_groups(space), mu=5.0, lr=1.0)
    before = weights(model[1])
    model(x).sum().backward()
    opt.step()
    assert opt.snap()
    small = construct(space, opt.solution()).eval()
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    assert same(before, weights(model[1]))


def test_frozen_layers_and_parameters_left_out():
    model = normed()
    model[0].requires_grad_(False)
    with pytest.raises(TrainingError, match=r"'0.weight' .* is frozen.*layers= or named groups without \['0'\]"):
        ProxSGD(layer_groups(model), mu=0.01)
    ProxSGD(layer_groups(model, ["3", "8"]), mu=0.01)
    with pytest.raises(TrainingError, match=r"'8.weight' .* is not in params=, .*, or add it to params="):
        ProxSGD(layer_groups(model, ["8"]), mu=0.01, params=model[3].parameters())
    opt = ProxSGD(layer_groups(model), mu=0.05, lr=0.1, params=model.parameters())  # named: it may thaw later
    before = weights(model[0])
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    opt.step()
    assert same(before, weights(model[0]))
    assert not any(name.startswith("0[") for name in opt.zero_groups())


# What params= may hold.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["mu", "tau", "momentum", "weightdecay"])
def test_a_key_that_nothing_reads_is_refused(kind, key):
    model = perceptron()
    groups = [{"params": model[0].parameters(), key: 5.0}, {"params": model[2].parameters()}]
    with pytest.raises(TrainingError, match=rf"'{key}' in params= .*: {kind.__name__} takes lr, .*opt.mu"):
        kind(layer_groups(model, ["0"]), mu=0.01, params=groups)


@pytest.mark.parametrize("key", ["mu", "tau", "momentum"])
def test_such_a_key_set_later_stops_the_next_step(key):
    model = perceptron()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.01)
    train(model, opt, 1)
    opt.param_groups[0][key] = 9.0
    before = weights(model)
    with pytest.raises(TrainingError, match=rf"'{key}' in params= or param_groups"):
        train(model, opt, 1)
    assert same(before, weights(model))
    with pytest.raises(TrainingError, match="parameters cannot be added later"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "mu": 1.0})


def test_what_torch_puts_into_parameter_groups_is_taken():
    model = perceptron()
    groups = [{"params": model.named_parameters(), "initial_lr": 0.1, "name": "all"}]
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.01, lr=0.1, params=groups)
    torch.optim.lr_scheduler.StepLR(opt, 1, 0.5, last_epoch=3)
    torch.optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=20, cycle_momentum=False)
    train(model, opt, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_scheduler_cycles_the_weight_of_the_new(kind):
    opt = kind(layer_groups(perceptron(), ["0"]), mu=0.01, lr=0.1)
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=20)
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.CyclicLR(opt, 0.1, 0.2)
    if kind is not ProxSGD:
        assert [group["c"] for group in opt.param_groups] == [0.1]


@pytest.mark.parametrize("kind", [RMDA, RAMDA])
def test_states_from_before_c_had_its_name(kind):
    model, twin = perceptron(), perceptron()
    opt, other = (kind(layer_groups(m, ["0"]), mu=0.01, lr=0.1, momentum=c) for m, c in ((model, 0.3), (twin, 0.7)))
    train(model, opt, 3)
    state = opt.state_dict()
    state["param_groups"] = [{"momentum" if k == "c" else k: v for k, v in g.items()} for g in state["param_groups"]]
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    train(model, opt, 3), train(twin, other, 3)
    assert same(weights(model), weights(twin))
    assert "momentum" not in other.param_groups[0]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("size", [1e19, 1e25, 3e38])
@pytest.mark.parametrize(("kind", "more"), [(RAMDA, {}), (ProxSGD, {"tau": "adaptive"})])
def test_a_gradient_too_large_to_be_squared_updates_nothing(kind, more, size, waits):
    model, twin = perceptron().float(), perceptron().float()
    opt, plain = (kind(layer_groups(m, ["0"]), mu=0.02, lr=0.1, **more) for m in (model, twin))
    opt._waits = waits
    x = torch.randn(8, 6)

    def step(model, opt, huge=None):
        opt.zero_grad()
        model(x).square().mean().backward()
        if huge is not None:
            model[2].weight.grad[0, 3] = huge
        opt.step()

    step(model, opt), step(twin, plain)
    before = weights(model)
    if waits:
        with pytest.raises(TrainingError, match=r"gradient of '2.weight' reaches .*e\+.*at step 1 .*nothing was"):
            step(model, opt, size)
    else:
        step(model, opt, size)
        with pytest.raises(TrainingError, match=r"too large at step 1, the last one; it updated nothing"):
            opt.zero_groups()
    assert same(before, weights(model))
    step(model, opt, 1e15), step(twin, plain, 1e15)
    step(model, opt), step(twin, plain)
    assert same(weights(model), weights(twin))
    assert all(p.isfinite().all() for p in weights(model))


@pytest.mark.parametrize("kind", [ProxSGD, RMDA])
def test_where_nothing_is_squared_a_huge_gradient_stays_finite(kind):
    model = perceptron().float()
    opt = kind(layer_groups(model, ["0"]), mu=0.02, lr=0.1)
    model(torch.randn(8, 6)).sum().backward()
    model[2].weight.grad[0, 3] = 1e25
    opt.step()
    assert all(p.isfinite().all() for p in weights(model))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))


@pytest.mark.parametrize("kind", KINDS)
def test_complex_parameters_are_refused(kind):
    model = nn.Sequential(nn.Linear(2, 2), Complex())
    with pytest.raises(TrainingError, match=r"'1.w' is complex.*view_as_real"):
        kind(named_groups(model, {"a": ["1.w"]}), mu=0.01)
    with pytest.raises(TrainingError, match=r"'1.w' is complex"):
        kind(layer_groups(model, ["0"]), mu=0.01)
