"""Steps on the support after a pruning, against the dense formula."""

import pytest
import torch
from torch import nn

from espalier.curvature.gradients import GradientOptions, gradients
from espalier.select.multistage import StageOptions, chita_plus_plus, in_stages
from espalier.select.steps import Steps, in_batches, step_on_support

CE = nn.functional.cross_entropy


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
    model(torch.randn(64, 5, dtype=torch.float64))  # statistics other than 0 and 1
    return model.eval(), (torch.randn(256, 5, dtype=torch.float64), torch.randint(3, (256,)))


def everything(name, module, parameter):
    return True


@pytest.mark.parametrize("m", [1, 4])
def test_a_step_is_the_damped_newton_step_on_the_support(task, m):
    model, (x, y) = task
    n, ridge, size = 16, 0.1, 0.7
    options = GradientOptions(dtype=torch.float64, method="loop")
    found = gradients(model, CE, (x, y), n, m, everything, options)
    support = torch.rand(found.layout.numel) < 0.6
    before = found.layout.flatten(model) * support
    found.layout.write(model, before)

    batch = x[100:150], y[100:150]
    reference = [p.clone() for p in model.parameters()]
    model.train()
    statistics = [b.clone() for b in model.buffers()]
    slopes = torch.autograd.grad(CE(model(batch[0]), batch[1]), tuple(model.parameters()))
    for buffer, old in zip(model.buffers(), statistics, strict=True):
        buffer.data.copy_(old)
    model.eval()
    slope = torch.cat([s.reshape(-1) for s in slopes])[support]
    F = found.A.T @ found.A / n + ridge * torch.eye(found.layout.numel, dtype=torch.float64)
    expected = before.clone()
    expected[support] -= size / m * torch.linalg.solve(F[support][:, support], slope)

    assert all(torch.equal(p, r) for p, r in zip(model.parameters(), reference, strict=True))
    step_on_support(model, CE, [batch], found, support, ridge, [size])
    after = found.layout.flatten(model)
    torch.testing.assert_close(after, expected)
    assert not bool(after[~support].any())
    assert not any(module.training for module in model.modules())


def test_a_step_in_bfloat16_is_the_same_up_to_its_rounding(task):
    model, (x, y) = task
    model, x = model.float(), x.float()
    found = gradients(model, CE, (x, y), 16, 4, everything)
    support = torch.rand(found.layout.numel) < 0.6
    before, after = found.layout.flatten(model) * support, {}
    for kind in (None, torch.bfloat16):
        found.layout.write(model, before)
        step_on_support(model, CE, [(x[:50], y[:50])], found, support, 0.1, [0.7], kind)
        after[kind] = found.layout.flatten(model)
    moved = (after[None] - before).norm()
    assert 0.0 < (after[torch.bfloat16] - after[None]).norm() < 0.05 * moved
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("free", [False, True])
def test_stages_with_steps_keep_the_budget_and_lower_the_loss(task, free):
    model, (x, y) = task
    model, x = model.float(), x.float()
    y = (x @ torch.randn(5, 3)).argmax(1)
    common = {"stages": 3, "n": 32, "batch": 2, "ridge": 0.1, "first_order": False, "recalibrate": 128, "free": free}
    results = {}
    for count in (0, 10):
        options = StageOptions(**common, steps=Steps(count, batch=64, size=0.5))
        result, pruned = in_stages(model, CE, (x, y), 0.5, options)
        weights = torch.cat(
            [p.detach().flatten() for n, p in pruned.named_parameters() if n in ("0.weight", "3.weight")]
        )
        assert torch.equal(result.weights, weights)
        assert int((weights != 0).sum()) <= 16
        assert not bool(weights[~result.support].any())
        results[count] = CE(pruned.eval()(x), y).item()
    assert results[10] < 0.9 * results[0]


def test_a_loader_may_have_batches_of_any_size(task):
    model, (x, y) = task
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.float(), y), batch_size=48)
    options = StageOptions(stages=2, n=16, batch=2, steps=Steps(3, batch=100))
    assert chita_plus_plus(model.float(), CE, loader, 0.5, options).kept == 16


def test_batches_are_cut_and_the_loader_begun_anew():
    loader = [(torch.arange(3), torch.arange(3)), (torch.arange(3, 5), torch.arange(3, 5))]
    found = [x.tolist() for x, _ in in_batches(loader, 3, 4)]
    assert found == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]
    with pytest.raises(ValueError, match="is it an iterator"):
        list(in_batches(iter(loader), 3, 4))


@pytest.mark.parametrize("wrong", [{"count": -1}, {"batch": 0}, {"size": 0.0}])
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match="at least"):
        Steps(**wrong)


def test_a_loss_that_overflows_is_named(task):
    model, (x, y) = task
    found = gradients(model, CE, (x, y), 8, 2)
    support = torch.ones(found.layout.numel, dtype=torch.bool)
    with pytest.raises(ValueError, match="take smaller steps"):
        step_on_support(model, CE, [(x[:8] * float("nan"), y[:8])], found, support, 0.1, [0.3])
    assert not model.training
