"""What the weight selectors take and refuse: arrays, counts, λ, solver names; progress."""

import contextlib
import io
import re
import warnings

import numpy as np
import pytest
import torch

from espalier.curvature.layout import WeightLayout
from espalier.select import cbs, chita, first_order_target, mfac, n_of_m, objective, per_layer, woodfisher
from espalier.select.cbs import CBSOptions
from espalier.select.exchange import ExchangeOptions
from espalier.select.iht import IHTOptions
from espalier.select.patterns import Quota, cardinality
from espalier.select.problem import Problem
from espalier.select.structured import structured_chita

SOLVERS = ["exchange", "iht", "magnitude"]
BASELINES = [cbs, woodfisher, mfac]


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 30, generator=g), torch.randn(30, generator=g)


@pytest.mark.parametrize("solver", SOLVERS)
def test_arrays_will_do(data, solver, tmp_path):
    A, w = data
    b = first_order_target(A, w)
    plain = chita(A, b, w, 6, 1e-2, solver)
    A.numpy().tofile(tmp_path / "A.bin")
    mapped = np.memmap(tmp_path / "A.bin", dtype=np.float32, mode="r", shape=(8, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for args in ((mapped, b.numpy(), w.numpy()), (A.requires_grad_(), b, w.requires_grad_())):
            result = chita(*args, k=6, ridge=1e-2, solver=solver)
            assert result.weights.equal(plain.weights)
            assert not result.weights.requires_grad
        assert first_order_target(mapped, w.detach().numpy()).equal(b)
        assert objective(mapped, b.numpy(), w, plain.weights, 1e-2) == pytest.approx(plain.objective)


@pytest.mark.parametrize("select", BASELINES)
def test_baselines_take_the_same(data, select, tmp_path):
    A, w = data
    plain = select(A, w, 6, 1e-2)
    for k in (np.int64(6), torch.tensor(6), cardinality(6, 30)):
        assert select(A.numpy(), w.numpy(), k, ridge=torch.tensor(1e-2, dtype=torch.float64)).weights.equal(
            plain.weights
        )
    assert select(A.clone().requires_grad_(), w.clone().requires_grad_(), 6, 1e-2).weights.equal(plain.weights)
    with pytest.raises(ValueError, match="covers 3 weights"):
        select(A, w, cardinality(2, 3), 1e-2)


SELECTORS = [lambda A, w, k, ridge: chita(A, None, w, k, ridge), *BASELINES]


@pytest.mark.parametrize("select", SELECTORS, ids=["chita", "cbs", "woodfisher", "mfac"])
def test_what_is_refused(data, select):
    A, w = data
    for k in (6.0, 0.2, True, "6", None, torch.tensor(6.0)):
        with pytest.raises(TypeError, match=r"k = .* neither a whole number of weights nor a Quota"):
            select(A, w, k, 1e-2)
    with pytest.raises(ValueError, match="k = 31 weights to keep"):
        select(A, w, np.int64(31), 1e-2)
    with pytest.raises(ValueError, match="infinite"):
        select(A, w, 6, float("inf"))
    with pytest.raises(TypeError, match="'1e-2' is not a number"):
        select(A, w, 6, "1e-2")
    with pytest.raises(TypeError, match="A is a list"):
        select(A.tolist(), w, 6, 1e-2)
    with pytest.raises(TypeError, match="w_bar is a list"):
        select(A, w.tolist(), 6, 1e-2)
    with pytest.raises(ValueError, match="w_bar must be floating"):
        select(A, w.long(), 6, 1e-2)


def test_solvers_and_their_options(data):
    A, w = data
    for name in ("foo", "chita++"):
        with pytest.raises(ValueError, match=re.escape(f"no solver is called '{name}': there are 'exchange', 'iht'")):
            chita(A, None, w, 6, 1e-2, solver=name)
    with pytest.raises(TypeError, match="solver='iht' takes IHTOptions"):
        chita(A, None, w, 6, 1e-2, solver="iht", options=ExchangeOptions())
    with pytest.raises(TypeError, match="solver='exchange' takes ExchangeOptions"):
        chita(A, None, w, 6, 1e-2, options=IHTOptions())


@pytest.mark.parametrize("ridge", [1e-300, 1e-20])
@pytest.mark.parametrize("solver", ["iht", "magnitude"])
def test_a_ridge_below_rounding_says_what_would_do(data, solver, ridge):
    A, w = data[0].double(), data[1].double()
    with pytest.raises(ValueError, match=r"too small for the scale of A.* would do") as caught:
        chita(A, None, w, 4, ridge, solver)
    enough = float(str(caught.value).split("λ ≥ ")[1].split()[0])
    assert np.isfinite(chita(A, None, w, 4, enough, solver).objective)


def test_exchanges_of_few_weights_need_less_ridge(data):
    """Few weights are refitted without A_S A_Sᵀ: a tiny λ is exact where the columns that stay are independent."""
    A, w = data[0].double(), data[1].double()
    for ridge in (1e-20, 1e-300):
        result = chita(A, None, w, 4, ridge)
        on = result.support
        best = torch.linalg.lstsq(A[:, on], A @ w).solution
        torch.testing.assert_close(result.weights[on], best)
    with pytest.raises(ValueError, match="too small for the scale of A"):
        chita(A, None, w, 20, 1e-300)  # 20 columns of 8 rows depend on each other


@pytest.mark.parametrize("select", [woodfisher, mfac])
def test_baselines_with_a_ridge_below_rounding(select):
    g = torch.Generator().manual_seed(0)
    A, w = torch.randn(20, 4, generator=g).double()[:, [0, 0, 1, 1]], torch.randn(4, generator=g).double()
    with pytest.raises(ValueError, match="too small for the scale of A"):
        select(A, w, 2, 1e-30)


def test_no_ridge_says_why_not():
    with pytest.raises(ValueError, match=r"ridge λ = 0.0: refits go through A_S A_Sᵀ .*n = 50, p = 4.*hardly change"):
        chita(torch.randn(50, 4), None, torch.randn(4), 2, 0.0)


@pytest.mark.parametrize("kind", ["layers", "pattern"])
def test_cbs_within_cells(data, kind):
    """CBS holds a quota, and ends where no swap within a cell lowers ½ w_Rᵀ F w_R."""
    A, w = data[0].double(), data[1].double()
    layout = WeightLayout(("a", "b"), ((2, 5), (5, 4)))
    quota = per_layer(layout, {"a": 0.2, "b": 0.5}) if kind == "layers" else n_of_m(layout, 2, 4)
    result = cbs(A, w, quota, 0.1)
    assert torch.bincount(quota.cell[result.support], minlength=len(quota.quota)).equal(quota.quota)

    def cost(support):
        gone = torch.where(support, 0.0, w)
        return float(0.5 * (A @ gone).square().sum() + 0.5 * 0.8 * gone.square().sum())

    assert result.history[-1] == pytest.approx(cost(result.support))
    for i in result.support.nonzero().flatten().tolist():
        for j in ((~result.support) & (quota.cell == quota.cell[i])).nonzero().flatten().tolist():
            other = result.support.clone()
            other[i], other[j] = False, True
            assert cost(other) >= cost(result.support) * (1 - 1e-6)


def test_cbs_with_everything_kept_and_full_cells(data):
    A, w = data
    assert cbs(A, w, 30, 0.1).weights.equal(w)
    quota = Quota(torch.arange(30) % 2, torch.tensor([15, 4]))
    assert cbs(A, w, quota, 0.1).support[::2].all()


def test_cbs_makes_no_second_matrix(data, monkeypatch):
    """No tensor of A's size is made, whatever its type."""
    monkeypatch.setattr("espalier.curvature.matrix.CHUNK_BYTES", 64 * 4 * 500)
    made = []

    A, w = data[0].bfloat16().repeat(8, 800), data[1].repeat(800)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != A.untyped_storage().data_ptr():
                made.append(out.numel())
            return out

    with Sizes():
        cbs(A, w, 100, 0.1, CBSOptions(shortlist=2))
    assert max(made) <= A.numel() // 2


@pytest.mark.parametrize("solver", ["exchange", "iht"])
def test_progress_where_asked_for(solver):
    g = torch.Generator().manual_seed(0)
    A, w = torch.randn(8, 300, generator=g), torch.randn(300, generator=g)
    for progress, shown in ((True, True), (False, False), (None, False)):
        with contextlib.redirect_stderr(io.StringIO()) as out:
            chita(A, None, w, 30, 1e-2, solver, progress=progress)
        assert ("30 of 300 weights" in out.getvalue()) == shown


def test_progress_and_budget_of_structures(data):
    problem = Problem.of(data[0], None, data[1], 1e-2)
    with contextlib.redirect_stderr(io.StringIO()) as out:
        structured_chita(problem, torch.arange(30) // 3, 5, progress=True)
    assert "10 groups of 30 weights" in out.getvalue()
    with pytest.raises(ValueError, match="budget = nan"):
        structured_chita(problem, torch.arange(30) // 3, float("nan"))
    with pytest.raises(ValueError, match="positive numbers"):
        structured_chita(problem, torch.arange(30) // 3, 5, torch.full((10,), float("inf")))
