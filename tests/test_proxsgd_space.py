"""ProxSGD, RMDA and RAMDA over the structures of a search space: before and after removal, the same network."""

import copy
import warnings

import pytest
import torch
from networks import Residual
from test_space_gates import Attention
from torch import nn
from torch.nn.functional import cross_entropy

from espalier import construct, search_space
from espalier.errors import SpaceError
from espalier.models import DARTS
from espalier.sparsify import RAMDA, RMDA, ProxSGD, fit_to_target, kept_share, space_groups


class Strided(nn.Module):
    """Convolutions, batch norms, a transposed convolution, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.c, self.last = nn.ConvTranspose2d(8, 6, 2), nn.Linear(6, 4)

    def forward(self, x):
        x = self.c(self.b(self.norm(self.a(x)).relu()))
        return self.last(x.relu().mean((2, 3)))


CASES = {
    "channel, strided": (Strided, (16, 3, 6, 6), "channel", 0.1),
    "channel, residual": (lambda: Residual(8), (16, 3, 6, 6), "channel", 0.4),
    "kernel": (lambda: Residual(6), (16, 3, 6, 6), "kernel", 0.05),
    "segment": (lambda: Residual(6), (16, 3, 6, 6), "segment", 0.8),
    "head": (Attention, (16, 6, 5), "head", 0.2),
}


def trained(name, make=ProxSGD, steps=120, key=None):
    torch.manual_seed(0)
    build, shape, level, mu = CASES[name]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    space = search_space(model, x, levels=(level,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = make(space_groups(space, key), mu=mu, lr=0.1)
    y = torch.arange(16) % 3
    model.train()
    for _ in range(steps):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()
    return model.eval(), x, space, opt


@pytest.mark.parametrize("make", [ProxSGD, RMDA, RAMDA])
@pytest.mark.parametrize("name", CASES)
def test_before_and_after_removal_are_identical(name, make):
    """What the support says is zero goes; the network that remains computes what the snapped one does."""
    model, x, space, opt = trained(name, make)
    zero = opt.snap()
    assert zero
    before = model(x)
    solution = opt.solution()
    small = construct(space, solution)
    torch.testing.assert_close(small(x), before, rtol=1e-10, atol=1e-12)
    assert torch.equal(small(x).argmax(1), before.argmax(1))
    assert set(solution.removed) <= set(zero)
    if space.families[0].level not in ("kernel", "segment"):
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_groups_hold_the_slices_of_their_structures(name):
    """A group's norm is what the slices at zero take away, structure by structure."""
    torch.manual_seed(0)
    build, shape, level, _ = CASES[name]
    model = build().double()
    space = search_space(model, torch.randn(shape, dtype=torch.float64), levels=(level,))
    groups = space_groups(space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norms = ProxSGD(groups, mu=0.0).group_norms()
    full = sum(float(p.detach().square().sum()) for p in model.parameters())
    for i, structure in list(enumerate(space.structures))[:12]:
        zeroed = space.zero_parameters(_alone(space, structure.name))
        left = sum(float(p.detach().square().sum()) for p in zeroed.parameters())
        assert float(norms[i]) ** 2 == pytest.approx(full - left, rel=1e-9)


def _alone(space, name):
    made = space.solution(())
    return type(made)((name,), made.fingerprint)


def test_tied_channels_die_together():
    def key(name: str) -> str:
        return name.replace("blocks.1", "blocks").replace("blocks.0", "blocks")

    torch.manual_seed(0)
    model = Residual(6)
    space = search_space(model, torch.randn(4, 3, 6, 6), levels=("segment",))
    groups = space_groups(space, key)
    assert groups.names == ("blocks.conv-bn", "blocks.2.conv-bn")
    assert groups.members == (("blocks.0.conv-bn", "blocks.1.conv-bn"), ("blocks.2.conv-bn",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = ProxSGD(groups, mu=50.0, lr=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.solution().removed == ("blocks.0.conv-bn", "blocks.1.conv-bn", "blocks.2.conv-bn")


def test_operations_of_darts_tied_by_type():
    from espalier.experiments.gsparsity import cell_type_key

    torch.manual_seed(0)
    model = DARTS(4, 3, 2, ("skip", "sep_conv_3x3"), affine=True)
    x = torch.randn(2, 3, 16, 16)
    space = search_space(model, x, keep=["stem"])
    key = cell_type_key(model)
    groups = space_groups(space, key)
    assert len(groups) < len(space)
    assert sum(len(m) for m in groups.members) == len(space)
    assert any(name.startswith("normal") for name in groups.names)


def test_levels_that_overlap_are_refused():
    model = Residual(6)
    space = search_space(model, torch.randn(2, 3, 6, 6), levels=("segment", "channel"))
    with pytest.raises(SpaceError, match=r"is in two groups, '.*' and 'stem\[0\]': .* of one level"):
        space_groups(space)


def test_the_step_leaves_the_model_whole():
    model, _, _, opt = trained("channel, residual")
    twin = copy.deepcopy(model)
    opt.solution()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class Stream(nn.Module):
    """A residual stream with layer norms, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.ff = nn.Linear(5, 16), nn.LayerNorm(16), nn.Linear(16, 12)
        self.out, self.last, self.head = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.inner(x)
        x = x + self.out(self.ff(self.norm(x)).relu())
        return self.head(self.last(x))


@pytest.mark.parametrize("keep", [(), ("inner",)])
def test_norms_over_the_channels_that_stay(keep):
    """The sub-network equals the masked network, not the snapped one, unless the normed channels are kept."""
    torch.manual_seed(0)
    model, x = Stream().double(), torch.randn(32, 5, dtype=torch.float64)
    space = search_space(model, x, levels=("channel",), keep=keep)
    opt = ProxSGD(space_groups(space), mu=0.15, lr=0.1)
    for _ in range(150):
        opt.zero_grad()
        cross_entropy(model(x), torch.arange(32) % 3).backward()
        opt.step()
    opt.snap()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        solution = opt.solution()
    assert solution.removed
    small = construct(space, solution)
    torch.testing.assert_close(small(x), space.masked(solution)(x), rtol=1e-10, atol=1e-12)
    if keep:
        assert not told
        torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-12)
    else:
        assert any(name.startswith("inner") for name in solution.removed)
        assert [str(w.message).split(" takes")[0] for w in told] == ["'norm' (2 such in all)"]
        assert "space.masked(solution)" in str(told[0].message)
        assert float((small(x) - model(x)).detach().abs().max()) > 0.01


@pytest.mark.parametrize("of", ["structures", "params", "macs"])
def test_mu_for_a_target(of):
    torch.manual_seed(0)
    model, x = Strided().double(), torch.randn(16, 3, 6, 6, dtype=torch.float64)
    space, y, starts = search_space(model, x, levels=("channel",)), torch.arange(16) % 3, []

    def fit(mu):
        starts.append(sum(float(p.detach().square().sum()) for p in model.parameters()))
        opt = ProxSGD(space_groups(space), mu=mu, lr=0.1)
        for _ in range(60):
            opt.zero_grad()
            cross_entropy(model(x), y).backward()
            opt.step()
        return opt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit_to_target(space, fit, 0.6, of=of, mu=0.02, tolerance=0.2)
    assert found.met, [(t.mu, t.share) for t in found.trials]
    assert len(set(starts)) > 1  # warm starts
    solution = found.best.state.solution
    small = construct(space, solution)
    full, left = space.cost(), space.cost(solution.removed)
    share = {
        "structures": 1 - len(solution.removed) / len(space),
        "params": sum(p.numel() for p in small.parameters()) / full.params,
        "macs": left.macs / full.macs,
    }[of]
    assert found.best.share == pytest.approx(share)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-12)
    with pytest.raises(SpaceError, match="there are structures, params and macs"):
        kept_share(space, solution, "latency")
