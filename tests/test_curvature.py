"""Gradients against autograd, inverses against dense matrices, and clear errors for what cannot work."""

import os
import warnings

import pytest
import torch
from torch import nn

from espalier.curvature import (
    BlockWoodburyInverse,
    DenseInverse,
    DualInverse,
    Fisher,
    GradientOptions,
    MatrixFreeInverse,
    WeightLayout,
    gradients,
)
from espalier.curvature.matrix import columns, gram, matvec, rmatvec
from espalier.curvature.memory import PeakBytes, sample_bytes
from espalier.curvature.plan import Probe, make_plan
from espalier.models.resnet_cifar import CifarResNet

CE = nn.functional.cross_entropy


class Small(nn.Module):
    """Grouped, strided and dilated convolutions, a layer used twice, batch norm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.fc(self.b(self.b(x)).mean((2, 3)))


def by_autograd(model, layout, x, y, batch):
    parameters = dict(model.named_parameters())
    rows = []
    for xs, ys in zip(x.split(batch), y.split(batch), strict=True):
        grads = torch.autograd.grad(CE(model(xs), ys), [parameters[name] for name in layout.names])
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Small().double().eval()
    return model, torch.randn(12, 3, 9, 9).double(), torch.randint(5, (12,))


@pytest.mark.parametrize("method", ["layers", "vmap", "loop", "auto"])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_equal_autograd(case, method, batch):
    model, x, y = case
    options = GradientOptions(dtype=torch.float64, method=method)
    found = gradients(model, CE, (x, y), 12 // batch, batch, options=options)
    expected = by_autograd(model, found.layout, x, y, batch)
    torch.testing.assert_close(found.A, expected)
    assert found.mean_loss == pytest.approx(float(CE(model(x), y).detach()))
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(found.w_bar, found.layout.flatten(model))


def test_sequence_inputs_and_embeddings_without_gradient():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).double().eval()
    x, y = torch.randint(7, (6, 3)), torch.randint(5, (6, 3))

    def loss(output, target):
        return CE(output.flatten(0, 1), target.flatten())

    options = {m: GradientOptions(dtype=torch.float64, method=m) for m in ("layers", "loop", "vmap")}
    a, b, c = (gradients(model, loss, (x, y), 3, 2, options=o).A for o in options.values())
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(c, b)


def test_chunks_loaders_and_disk_give_the_same_rows(case, tmp_path):
    model, x, y = case
    whole = gradients(model, CE, (x, y), 12, options=GradientOptions(dtype=torch.float64)).A
    loader = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
    small = GradientOptions(dtype=torch.float64, memory_limit=1, path=tmp_path / "A.bin")
    torch.testing.assert_close(gradients(model, CE, loader, 12, options=small).A, whole)
    assert os.path.getsize(tmp_path / "A.bin") == whole.numel() * 8
    brain = GradientOptions(dtype=torch.bfloat16, path=tmp_path / "B.bin", progress=True)
    stored = gradients(model, CE, loader, 12, options=brain).A
    assert stored.dtype == torch.bfloat16
    torch.testing.assert_close(stored.double(), whole, rtol=1e-2, atol=1e-3)


def test_rank_rows_partition(case, monkeypatch):
    model, x, y = case
    options = GradientOptions(dtype=torch.float64)
    whole = gradients(model, CE, (x, y), 5, 2, options=options).A
    module = __import__("espalier.curvature.gradients", fromlist=["_rank_rows"])
    parts = []
    for low, high in ((0, 2), (2, 5)):
        monkeypatch.setattr(module, "_rank_rows", lambda n, low=low, high=high: (low, high))
        part = gradients(model, CE, (x, y), 5, 2, options=options)
        assert (part.first_row, part.total_rows) == (low, 5)
        parts.append(part.A)
    torch.testing.assert_close(torch.cat(parts), whole)


class OwnLinear(nn.Linear):
    """No layer that the per-layer products know."""


class ReadsItsInput(nn.Module):
    """A model that vmap cannot take: it looks at the values of its input."""

    def __init__(self, linear):
        super().__init__()
        self.fc = linear(2, 2)

    def forward(self, x):
        return self.fc(x) * float(x.abs().sum().item() > -1)


def test_vmap_falls_back_with_a_warning():
    model, x, y = ReadsItsInput(OwnLinear).eval(), torch.randn(3, 2), torch.tensor([0, 1, 0])
    with pytest.warns(UserWarning, match="gradients by method='loop' instead: 'vmap' cannot take this model"):
        found = gradients(model, CE, (x, y), 3)
    torch.testing.assert_close(found.A, by_autograd(model, found.layout, x, y, 1))


def test_vmap_asked_for_is_refused_where_it_cannot_work():
    model, data = ReadsItsInput(nn.Linear).eval(), (torch.randn(3, 2), torch.tensor([0, 1, 0]))
    with pytest.raises(
        ValueError, match=r"method='vmap' cannot take this model and loss .* Use method='auto', or 'loop'"
    ):
        gradients(model, CE, data, 3, options=GradientOptions(method="vmap"))


class _Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("method", ["layers", "vmap", "loop"])
def test_layers_that_take_no_part_have_zero_columns_and_are_named(method):
    torch.manual_seed(0)
    data = torch.randn(8, 6), torch.randint(3, (8,))
    options = GradientOptions(method=method)
    with pytest.warns(UserWarning, match=r"no gradient reaches spare\.weight: not used"):
        found = gradients(_Unused().eval(), nn.functional.cross_entropy, data, 4, 2, options=options)
    assert tuple(found.layout.names) == ("used.weight", "spare.weight")
    assert bool(found.A[:, :18].any())
    assert not bool(found.A[:, 18:].any())


def test_input_overwritten_in_place_is_refused():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            x = x * 1.0
            y = self.fc(x)
            x.add_(1)
            return y

    with pytest.raises(ValueError, match="modified by an inplace operation"):
        gradients(Overwrites().eval(), CE, (torch.randn(3, 2), torch.tensor([0, 1, 0])), 3)


class TestBadInput:
    def test_training_mode(self, case):
        model, x, y = case
        model.norm.train()
        with pytest.raises(ValueError, match=r"training mode \(norm\)"):
            gradients(model, CE, (x, y), 2)

    @pytest.mark.parametrize(("n", "batch"), [(0, 1), (1, 0)])
    def test_nothing_asked(self, case, n, batch):
        with pytest.raises(ValueError, match="at least 1"):
            gradients(case[0], CE, case[1:], n, batch)

    def test_too_little_data(self, case):
        with pytest.raises(ValueError, match="ended 1 samples too early"):
            gradients(case[0], CE, case[1:], 13)

    def test_loader_of_other_shapes(self, case):
        model, x, y = case
        with pytest.raises(ValueError, match="12 inputs with 5 targets"):
            gradients(model, CE, (x, y[:5]), 2)

    def test_not_finite(self, case):
        model, x, y = case
        x = x.clone()
        x[7] = torch.nan
        with pytest.raises(ValueError, match="mini-batch 7 is not finite"):
            gradients(model, CE, (x, y), 12)

    def test_not_enough_memory(self, case, tmp_path):
        model, x, y = case
        path = tmp_path / "A.bin"
        for options in (GradientOptions(memory_limit=1 << 60), GradientOptions(path=path)):
            with pytest.raises(MemoryError, match="would fit"):
                gradients(model, CE, (x, y), 1 << 50, options=options)
        assert not path.exists()

    def test_tied_and_frozen(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
        model[1].weight = model[0].weight
        with pytest.raises(ValueError, match=r"0.weight and 1.weight are one tied tensor"):
            WeightLayout.of(model)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
        model[1].weight.requires_grad_(False)
        with pytest.raises(ValueError, match=r"frozen weights cannot be pruned: 1.weight"):
            WeightLayout.of(model)
        with pytest.raises(ValueError, match="accepts no parameter"):
            WeightLayout.of(nn.BatchNorm1d(3))


def test_layout_round_trip():
    model = CifarResNet(1).eval()
    layout = WeightLayout.of(model, lambda name, module, p: p.ndim > 1 and "downsample" not in name)
    vector = layout.flatten(model)
    assert len(vector) == layout.numel == int(layout.tensor_index().bincount().sum())
    layout.write(model, vector * 2)
    torch.testing.assert_close(layout.flatten(model), vector * 2)
    with pytest.raises(ValueError, match="expected"):
        layout.unflatten(vector[1:])


@pytest.fixture(params=[(5, 12), (20, 12), (1, 3)], ids=str)
def A(request):
    torch.manual_seed(2)
    return torch.randn(*request.param, dtype=torch.float64)


@pytest.mark.parametrize("damping", [1e-3, 0.7])
@pytest.mark.parametrize("kind", [DenseInverse, DualInverse, MatrixFreeInverse, BlockWoodburyInverse])
def test_inverses_equal_dense(A, damping, kind):
    n, p = A.shape
    F = A.t() @ A / n + damping * torch.eye(p).double()
    inverse = kind(A, damping)
    v, V = torch.randn(p).double(), torch.randn(p, 3).double()
    for x in (v, V):
        torch.testing.assert_close(inverse @ x, torch.linalg.solve(F, x), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(inverse.solve(x), F @ x)
        torch.testing.assert_close(Fisher(A, damping) @ x, F @ x)
        torch.testing.assert_close(Fisher(A, damping).solve(x), torch.linalg.solve(F, x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse.diag(), torch.linalg.inv(F).diagonal(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(Fisher(A, damping).diag(), F.diagonal())
    torch.testing.assert_close(Fisher(A, damping).dense(), F)


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_blocks_do_not_cross_tensors(A, block):
    n, p = A.shape
    sizes = (p - 1, 1)
    inverse = BlockWoodburyInverse(A, 0.3, block, sizes)
    F = torch.zeros(p, p).double()
    for part in inverse.blocks:
        assert part.stop - part.start <= block
        assert part.stop <= p - 1 or part.start >= p - 1
        F[part, part] = A[:, part].t() @ A[:, part] / n + 0.3 * torch.eye(part.stop - part.start).double()
    v = torch.randn(p).double()
    torch.testing.assert_close(inverse @ v, torch.linalg.solve(F, v))
    torch.testing.assert_close(inverse.diag(), torch.linalg.inv(F).diagonal())
    torch.testing.assert_close(inverse.solve(v), F @ v)


@pytest.mark.parametrize("kind", [DenseInverse, DualInverse, MatrixFreeInverse, BlockWoodburyInverse])
def test_inverse_needs_damping_and_gradients(kind):
    with pytest.raises(ValueError, match="no inverse without a positive"):
        kind(torch.ones(2, 3), 0.0)
    with pytest.raises(ValueError, match="at least one gradient"):
        kind(torch.ones(0, 3), 1.0)


@pytest.mark.parametrize("kind", [Fisher, DenseInverse, DualInverse, MatrixFreeInverse, BlockWoodburyInverse])
def test_operators_take_arrays_and_have_a_shape(A, kind):
    operator, same = kind(A.numpy(), 0.3), kind(A, 0.3)
    v = torch.randn(A.shape[1]).double()
    assert operator.shape == (A.shape[1], A.shape[1])
    assert (operator @ v).equal(same @ v)
    assert operator.diag().equal(same.diag())
    assert operator.solve(v).equal(same.solve(v))


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_block_factors_are_kept_only_where_they_fit(A, block):
    v = torch.randn(A.shape[1]).double()
    kept, anew = BlockWoodburyInverse(A, 0.3, block), BlockWoodburyInverse(A, 0.3, block, memory_limit=0)
    assert (kept @ v).equal(anew @ v)
    assert kept.diag().equal(anew.diag())
    assert kept._kept is not None
    assert anew._kept is None


def test_stores_that_do_not_fit_are_refused_before(A, monkeypatch):
    monkeypatch.setattr("espalier.curvature.memory.available_memory", lambda: 8 * A.numel() - 1)
    v = torch.randn(A.shape[1]).double()
    with pytest.raises(MemoryError, match=r"as large as A, needs .* use DualInverse"):
        _ = MatrixFreeInverse(A, 0.3) @ v
    with pytest.raises(MemoryError, match=r"a dense matrix of .* use DualInverse"):
        _ = DenseInverse(A, 0.3) @ v


@pytest.mark.parametrize("layout", ["rows", "columns", "bfloat16"])
def test_products_whatever_the_storage(layout):
    torch.manual_seed(3)
    A = torch.randn(6, 40).bfloat16()
    plain = A.double()
    stored = {"rows": A.float(), "columns": A.float().t().contiguous().t(), "bfloat16": A}[layout]
    index, x, y = torch.tensor([3, 0, 17]), torch.randn(40), torch.randn(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(columns(stored, index).double(), plain[:, index])
        torch.testing.assert_close(gram(stored), plain @ plain.t(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gram(stored, index), plain[:, index] @ plain[:, index].t(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(matvec(stored, x).double(), plain @ x.double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rmatvec(stored, y).double(), plain.t() @ y.double(), rtol=1e-4, atol=1e-4)


def test_memory_limit_is_kept(case):
    """Rows of many samples are added up from parts; the working memory of a chunk stays below the limit."""
    model, x, y = case
    for batch in (1, 6):
        whole = gradients(model, CE, (x, y), 12 // batch, batch, options=GradientOptions(dtype=torch.float64)).A
        for limit in (1, 3 * sample_bytes(model, x[:1]), 1 << 30):
            options = GradientOptions(dtype=torch.float64, memory_limit=limit)
            torch.testing.assert_close(gradients(model, CE, (x, y), 12 // batch, batch, options=options).A, whole)


@pytest.mark.parametrize("method", ["layers", "vmap"])
def test_chunks_hold_no_more_than_the_limit(method):
    """Measured apart: the tensors that one chunk of the planned size makes."""
    model, limit = nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 3)).eval(), 4 << 20
    x, y = torch.randn(64, 50), torch.randint(3, (64,))
    layout = WeightLayout.of(model)
    plan = make_plan(Probe(model, CE, layout, x[:4], y[:4], 4, 1), GradientOptions(memory_limit=limit, method=method))
    assert 4 < plan.rows < 64
    with PeakBytes() as peak:
        plan.compute(model, CE, layout, x[: plan.rows], y[: plan.rows], plan.rows)
    assert limit / 4 < peak.bytes <= limit


def test_sample_bytes_sees_what_autograd_keeps():
    model = nn.Sequential(nn.Linear(10, 1000), nn.Tanh(), nn.Linear(1000, 1000), nn.Tanh()).eval()
    held = sample_bytes(model, torch.ones(1, 10))
    assert 2 * 4 * 2000 <= held <= 2 * 4 * 5000
    assert 7 * held < sample_bytes(model, torch.ones(8, 10)) < 9 * held
    assert sample_bytes(model, torch.ones(10_000, 10)[:1]) == held  # not what it is a view of
    conv = nn.Conv2d(3, 4, 3, padding=1).eval()
    assert sample_bytes(conv, torch.ones(1, 3, 16, 16)) >= 27 * 256 * 4  # the unfolded input


def test_cost_is_said_before_the_start(case, capfd):
    model, x, y = case
    gradients(model, CE, (x, y), 12, options=GradientOptions(progress=True))
    said = capfd.readouterr().err
    assert "12 rows ×" in said
    assert "GiB in memory" in said
    gradients(model, CE, (x, y), 12)
    assert not capfd.readouterr().err


def test_loaders_that_cannot_be_used(case):
    model, x, y = case
    with pytest.raises(ValueError, match="data is empty"):
        gradients(model, CE, [], 2)
    with pytest.raises(ValueError, match="3 parts"):
        gradients(model, CE, [(x, y, y)], 2)
    with pytest.raises(ValueError, match=r"shape \(3, 9, 9\) and then of \(3, 8, 8\)"):
        gradients(model, CE, [(x[:5], y[:5]), (x[5:, :, :8, :8], y[5:])], 12, 1)
