"""Single weights from a search space: every method, masks in a solution, fine-tuning, files."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from espalier import construct, export, search_space
from espalier.batchnorm import recalibrate
from espalier.curvature.gradients import GradientOptions, gradients
from espalier.curvature.layout import WeightLayout
from espalier.errors import BudgetError, FormatError, InvalidSolution, SpaceError
from espalier.select import chita
from espalier.select.gradual import GradualOptions, GradualPruner
from espalier.select.masking import hold_masks, zero_masks
from espalier.select.multistage import StageOptions, chita_plus_plus, in_stages
from espalier.select.sparse import SparseLinear, sparse_layout
from espalier.select.weights import WEIGHT_METHODS, WEIGHT_OPTIONS, fitted, output_loss, prune_weights
from espalier.space.solution import Solution

CE = nn.functional.cross_entropy
FEW = StageOptions(stages=3, n=40, batch=4)
ONE = {"n": 40, "batch": 4}  # the rest as the method has it


def few(method):
    return FEW if method.endswith("++") else ONE


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = Net()
    x, y = torch.randn(400, 2, 4, 4), torch.randint(3, (400,))
    model(x)  # running statistics
    return search_space(model, x[:3]), (x, y)


@pytest.mark.parametrize("method", WEIGHT_METHODS)
@pytest.mark.parametrize("layers", ["together", "each", "erk"])
def test_every_method_gives_a_solution(task, method, layers):
    space, data = task
    before = {n: p.clone() for n, p in space.model.state_dict().items()}
    again, solution = prune_weights(space, data, keep=0.3, method=method, layers=layers, options=few(method))
    small = construct(again, solution)
    layout = WeightLayout.of(small)
    kept = int((layout.flatten(small) != 0).sum())
    assert abs(kept - int(0.3 * layout.numel)) <= (0 if layers == "together" else 2)
    for name, mask in solution.masks.items():
        gone = small.get_parameter(name)[~mask]
        assert not gone.any()
        assert not torch.signbit(gone).any()
        if layers == "each":
            assert int(mask.sum()) == int(0.3 * mask.numel())
    x = data[0][:7]
    for mode in (True, False):  # the same as the masked network, in both modes
        masked = again.masked(solution)
        assert copy.deepcopy(small).train(mode)(x).equal(masked.train(mode)(x))
    assert small.training == space.model.training
    assert all(before[n].equal(p) for n, p in space.model.state_dict().items())


def test_one_stage_is_the_solver(task):
    """`prune_weights` with method "exchange" gives what `chita` gives on the same gradients."""
    space, data = task
    options = StageOptions(stages=1, n=40, batch=4, first_order=False, drop_dead=False, ridge=1e-3)
    again, solution = prune_weights(space, data, keep=0.2, method="exchange", options=options)
    index = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:160]
    found = gradients(copy.deepcopy(space.model).eval(), CE, (data[0][index], data[1][index]), 40, 4)
    result = chita(found.A, None, found.w_bar, int(0.2 * found.layout.numel), 1e-3)
    assert found.layout.flatten(again.model).equal(result.weights)
    assert all(solution.masks[n].equal(m) for n, m in result.masks(found.layout).items())


def test_patterns_and_seeds(task):
    space, data = task
    for method in ("exchange", "exchange++", "weight-magnitude"):
        again, solution = prune_weights(space, data, method=method, pattern=(2, 4), options=few(method))
        rows = (construct(again, solution).fc.weight != 0).view(3, 8, 4).sum(2)
        assert bool((rows == 2).all())
    first, second = (prune_weights(space, data, keep=0.3, options=FEW)[1].masks for _ in range(2))
    assert all(first[n].equal(second[n]) for n in first)


def test_saved_solution_and_pruned_checkpoint_in_a_new_process(task, tmp_path):
    space, data = task
    again, solution = prune_weights(space, data, keep=0.3, options=FEW)
    solution.save(tmp_path / "masks")
    back = Solution.load(tmp_path / "masks")
    assert back.removed == solution.removed
    assert back.fingerprint == solution.fingerprint == space.fingerprint
    assert dict(back.provenance) == dict(solution.provenance) | {"pattern": None}
    assert all(back.masks[n].equal(m) and back.masks[n].dtype == torch.bool for n, m in solution.masks.items())
    small = nn.Sequential(*[copy.deepcopy(construct(again, solution)).fc])
    export.save(small, tmp_path / "small")
    code = (
        "import sys, torch; from espalier.export import load; from espalier.space.solution import Solution;"
        "m = load(sys.argv[1]); s = Solution.load(sys.argv[2]);"
        "print(int((m[0].weight != 0).sum()), int(s.masks['fc.weight'].sum()),"
        "sum(int(v.sum()) for v in s.masks.values()))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "masks")],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    inside = int(solution.masks["fc.weight"].sum())
    assert [int(v) for v in said] == [inside, inside, sum(int(m.sum()) for m in solution.masks.values())]
    (tmp_path / "masks").write_bytes((tmp_path / "masks").read_bytes()[:-20])
    with pytest.raises(FormatError, match="damaged"):
        Solution.load(tmp_path / "masks")


def test_a_failed_save_leaves_the_old_file(task, tmp_path):
    path = tmp_path / "solution"
    Solution((), "ab").save(path)
    with pytest.raises(TypeError):
        Solution((), "cd", provenance={"bad": object()}).save(path)
    assert Solution.load(path).fingerprint == "ab"
    assert [p.name for p in tmp_path.iterdir()] == ["solution"]


def test_masks_that_do_not_fit_are_refused(task):
    space, _ = task
    right = space.fingerprint
    with pytest.raises(InvalidSolution, match="no such parameter"):
        construct(space, Solution((), right, {"nope": torch.ones(1, dtype=torch.bool)}))
    with pytest.raises(InvalidSolution, match="shape"):
        construct(space, Solution((), right, {"fc.weight": torch.ones(1, dtype=torch.bool)}))
    with pytest.raises(InvalidSolution, match="another model"):
        construct(space, Solution((), "0", {}))


def test_masks_and_removed_channels_in_one_solution(task):
    """The narrowed network equals the masked one; its zeros are read off and held."""
    _, data = task
    model = Net().double()
    x = data[0].double()
    space = search_space(model, x[:3], levels=("channel",))
    again, pruned = prune_weights(space, keep=0.4, method="weight-magnitude")
    both = Solution(("conv[1]", "conv[6]"), again.fingerprint, pruned.masks)
    small = construct(again, both)
    assert small.conv.out_channels == 6
    for mode in (True, False):
        alone = copy.deepcopy(small)  # a pass in train mode moves the running statistics
        torch.testing.assert_close(alone.train(mode)(x), again.masked(both).train(mode)(x))
    masks = zero_masks(small)
    optimizer = torch.optim.Adam(small.parameters(), 0.01)
    hold_masks(small, masks, optimizer)
    CE(small(x), data[1]).backward()
    optimizer.step()
    assert all(not small.get_parameter(n)[~m].any() for n, m in masks.items())


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "lbfgs"])
def test_zeros_of_a_constructed_model_stay_through_training(task, kind):
    space, data = task
    small = construct(*prune_weights(space, data, keep=0.3, method="weight-magnitude"))
    made = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, 0.01),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
        "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
        "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    }[kind](small.parameters())
    masks = zero_masks(small)
    hold = hold_masks(small, masks, made)

    def closure():
        made.zero_grad()
        loss = CE(small(data[0]), data[1])
        loss.backward()
        return loss

    for _ in range(3):
        closure()
        made.step(closure) if kind == "lbfgs" else made.step()
        for name, mask in masks.items():
            parameter = small.get_parameter(name)
            assert not parameter[~mask].any()
            assert not torch.signbit(parameter[~mask]).any()
            for value in made.state.get(parameter, {}).values():  # no momentum gathers behind the mask
                if isinstance(value, torch.Tensor) and value.shape == mask.shape and kind != "lbfgs":
                    assert not value[~mask].any()
    assert bool((small.fc.weight != 0).any())
    hold.remove()
    closure()
    made.step(closure) if kind == "lbfgs" else made.step()
    assert any(small.get_parameter(n)[~m].any() for n, m in masks.items())


def test_a_weight_that_returns_starts_without_momentum():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masks = iter([torch.tensor([[True, False]]), torch.tensor([[False, True]])])

    def select(model, keep, event):
        mask = next(masks)
        return {"weight": mask}, {"weight": torch.ones(1, 2)}

    pruner = GradualPruner(model, optimizer, select, GradualOptions(last=0.5, events=2, every=1))
    for epoch in range(2):
        pruner.before_epoch(epoch)
        assert not optimizer.state[model.weight]["momentum_buffer"].any() if epoch else True
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_frozen_batch_norm_stays_in_eval_mode_while_the_rest_trains():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), nn.Dropout())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def select(model, keep, event):
        assert not any(m.training for m in model.modules())
        return {"0.weight": torch.eye(2).bool()}, {"0.weight": torch.eye(2)}

    GradualPruner(model, optimizer, select, GradualOptions(last=0.5, events=1, every=1)).before_epoch(0)
    assert [m.training for m in model] == [True, False, True]


def test_sparse_layout_gives_the_same_output(task):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10, bias=False)).double()
    space = search_space(model, torch.randn(3, 64).double())
    small = construct(*prune_weights(space, keep=0.1, method="weight-magnitude"))
    x = torch.randn(2, 5, 64).double()
    for where in ("always", "faster"):
        sparse = sparse_layout(small, x, where=where)
        torch.testing.assert_close(sparse(x), small(x))
        assert where == "faster" or all(isinstance(sparse[i], SparseLinear) for i in (0, 2))
    assert sum(v.numel() for k, v in sparse_layout(small, x, "always").state_dict().items() if "values" in k) == int(
        0.1 * (64 * 128 + 1280)
    )


def test_recalibrated_statistics_are_those_of_the_samples(task):
    model, x = task[0].model.double(), task[1][0].double()
    torch.nn.init.normal_(model.conv.weight)
    assert recalibrate(model, x, samples=200, batch=50) == 200
    seen = model.conv(x[:200]).detach().transpose(0, 1)
    torch.testing.assert_close(model.norm.running_mean, seen.flatten(1).mean(1))
    parts = [seen[:, i : i + 50].flatten(1).var(1) for i in range(0, 200, 50)]
    torch.testing.assert_close(model.norm.running_var, torch.stack(parts).mean(0))
    assert model.training
    assert model.norm.momentum == 0.1
    mean = model.norm.running_mean.clone()
    assert recalibrate(model, x[:1]) == 0  # no variance of one sample: nothing changes
    assert model.norm.running_mean.equal(mean)
    assert recalibrate(nn.Linear(2, 2), x) == 0


def test_stages_with_new_statistics(task):
    space, data = task
    options = StageOptions(stages=2, n=40, batch=4, recalibrate=100)
    again, _ = prune_weights(space, data, keep=0.3, options=options)
    assert not again.model.norm.running_mean.equal(space.model.norm.running_mean)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 32, shuffle=True)
    again, solution = prune_weights(space, loader, keep=0.3, options=options)
    assert solution.provenance["kept"] == int(0.3 * 240)


def test_free_weights_are_refitted_with_those_that_stay(task):
    """Against the normal equations of problem (5) over the support and all parameters that are not prunable."""
    model, (x, y) = task[0].model.double().eval(), task[1]
    options = StageOptions(1, n=40, batch=4, ridge=0.1, solver="magnitude", drop_dead=False, free=True)
    options = replace(options, gradient=GradientOptions(dtype=torch.float64))
    loader = [(x[:160].double(), y[:160])]
    before = {name: p.clone() for name, p in model.named_parameters()}
    result, pruned = in_stages(model, CE, loader, 0.3, options)
    layout = WeightLayout.of(model)
    assert (len(result.weights), result.kept) == (layout.numel, int(0.3 * layout.numel))

    rows = []
    for a, b in zip(loader[0][0].split(4), loader[0][1].split(4), strict=True):
        found = torch.autograd.grad(CE(model(a), b), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    A = torch.stack(rows)
    names = [name for name, _ in model.named_parameters()]
    w_bar = torch.cat([before[name].flatten() for name in names])
    masks = result.masks(layout)
    support = torch.cat([masks.get(name, torch.ones_like(before[name], dtype=torch.bool)).flatten() for name in names])
    rho, target = 40 * 0.1, A @ w_bar - 1.0 / 4
    inside = A[:, support]
    wanted = torch.zeros_like(w_bar)
    wanted[support] = torch.linalg.solve(
        inside.T @ inside + rho * torch.eye(inside.shape[1], dtype=A.dtype), inside.T @ target + rho * w_bar[support]
    )
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in pruned.parameters()]), wanted)
    assert not pruned.norm.weight.equal(before["norm.weight"])
    with pytest.raises(ValueError, match="in_stages"):
        chita_plus_plus(model, CE, loader, 0.3, options)


def test_free_weights_reach_the_constructed_network(task):
    space, data = task
    options = StageOptions(stages=2, n=40, batch=4, free=True)
    again, solution = prune_weights(space, data, keep=0.3, options=options)
    assert solution.provenance["kept"] == int(0.3 * 240)
    small = construct(again, solution)
    assert not small.norm.bias.equal(space.model.norm.bias)
    assert sum(int((p != 0).sum()) for p in small.parameters() if p.ndim > 1) == int(0.3 * 240)


class TestBadInput:
    def test_names_fractions_and_data(self, task):
        space, data = task
        with pytest.raises(SpaceError, match="there are exchange"):
            prune_weights(space, data, method="nope")
        for keep in (0, -1, 1.5, 1e-6):
            with pytest.raises(BudgetError, match="weights="):
                prune_weights(space, data, keep=keep)
        with pytest.raises(SpaceError, match="needs data"):
            prune_weights(space, None)
        with pytest.raises(BudgetError, match="budget of its own"):
            prune_weights(space, data, pattern=(2, 4), layers="each")
        with pytest.raises(BudgetError, match="'together'"):
            prune_weights(space, data, layers="both")
        with pytest.raises(ValueError, match="samples"):
            prune_weights(space, data, options=StageOptions(n=1000, batch=16))

    def test_tied_and_frozen(self, task):
        _, data = task
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        model[3].weight = model[1].weight
        space = search_space(model, data[0][:3])
        with pytest.raises(ValueError, match="tied"):
            prune_weights(space, data)
        model = Net()
        model.fc.weight.requires_grad_(False)
        with pytest.raises(ValueError, match=r"fc\.weight"):
            prune_weights(search_space(model, data[0][:3]), data)


def test_fewer_samples_than_the_default_are_said(task):
    space, data = task
    with pytest.warns(UserWarning, match="400 samples"):
        made = fitted(WEIGHT_OPTIONS["exchange++"], data)
    assert made.n * made.batch <= 400
    batches = list(zip(data[0].split(100), data[1].split(100), strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 32)
    with pytest.warns(UserWarning, match="400 samples"):
        assert fitted(WEIGHT_OPTIONS["exchange++"], batches) == fitted(WEIGHT_OPTIONS["exchange++"], loader) == made
    assert fitted(FEW, data) is FEW
    with pytest.warns(UserWarning, match="400 samples"):
        prune_weights(space, iter(batches), keep=0.5, method="chita")


def test_loss_of_a_model_as_loss_of_an_output(task):
    space, data = task
    by_model = output_loss(lambda model, batch: CE(model(batch[0]), batch[1]))
    one = prune_weights(space, data, by_model, keep=0.3, options=FEW)[0].model
    other = prune_weights(space, data, keep=0.3, options=FEW)[0].model
    assert one.fc.weight.equal(other.fc.weight)
