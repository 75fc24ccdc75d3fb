"""Gates on any search space: exact at 0, folded exactly, at every level; per sample; on single weights."""

import copy
import itertools

import pytest
import torch
from networks import Residual, SharedTwice, SqueezeExcite, TwoBranches
from torch import Tensor, nn
from torch.nn import functional as F

from espalier import construct, search_space
from espalier.errors import SpaceError, TrainingError
from espalier.models import DemoNet
from espalier.sparsify import HardSigmoid, Sigmoid, SpaceGates

ALL = ("segment", "channel", "head")


class Attention(nn.Module):
    """Self-attention by hand, a gated feed-forward layer, layer norms and a position table."""

    def __init__(self, width: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Linear(5, width), nn.Parameter(torch.randn(6, width))
        self.norm1, self.norm2, self.last = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)
        self.up, self.gate, self.down = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.last(x).mean(1))


class Torchs(nn.Module):
    """torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


@pytest.fixture(autouse=True)
def no_fast_path():
    """torch's encoder layer in eval mode looks into its norms, which the masked network has replaced."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


NETWORKS = {
    "perceptron": (perceptron, (6, 5)),
    "residual, batch norm": (lambda: Residual(6), (4, 3, 6, 6)),
    "attention": (Attention, (3, 6, 5)),
    "torch's encoder": (Torchs, (3, 6, 5)),
    "group norm": (grouped, (4, 3, 6, 6)),
    "two branches": (TwoBranches, (5, 4)),
    "squeeze and excite": (SqueezeExcite, (4, 3, 5, 5)),
    "shared layer": (SharedTwice, (4, 4)),
    "demo": (lambda: DemoNet(width=0.1), (3, 3, 8, 8)),
}


def setting(name: str, levels=ALL, **options):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model.train()(x)  # running statistics
    space = search_space(model, x, levels=levels)
    gates = SpaceGates(space, **options).double()
    return model.eval(), x, space, gates


def randomize(gates: SpaceGates, scale: float = 1.0) -> None:
    with torch.no_grad():
        gates.phi.copy_(scale * torch.randn(gates.phi.shape, generator=torch.Generator().manual_seed(5)))
        gates.phi[0] = -4.0


@pytest.mark.parametrize("method", ["hc", "arm"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_gated_model_equals_the_constructed_one(name, method):
    model, x, space, gates = setting(name, estimator=method)
    randomize(gates, 3.0 if method == "hc" else 1.0)
    gated = gates(x)
    solution = gates.solution()
    assert len(solution.removed) > 0
    finished = gates.finish()
    small = construct(space, solution)
    for network in (small, finished, gates):
        torch.testing.assert_close(network(x), gated, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gates.space.masked(solution)(x), gated, rtol=1e-9, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_gate_at_zero_is_the_structure_removed(name, training):
    """In eval and in train mode, against the masked network, for binary gates."""
    model, x, space, gates = setting(name)
    names = list(space.structures.names)
    make = torch.Generator().manual_seed(1)
    for _ in range(4):
        order = torch.randperm(len(names), generator=make).tolist()
        removed = space.removable_in_order([names[i] for i in order], stop_at=max(1, len(names) // 2))
        z = torch.ones(len(names), dtype=torch.float64)
        z[[space.position(n) for n in removed]] = 0.0
        gates._z = z
        masked = space.masked(space.solution(removed)).train(training)
        twin = {n: b.clone() for n, b in model.named_buffers()}
        got = gates.train(training)(x) if not training else _train_mode(gates, model, x)
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(twin[n])
        torch.testing.assert_close(got, masked(x), rtol=1e-9, atol=1e-9)


def _train_mode(gates, model, x):
    model.train()
    try:
        return gates(x)
    finally:
        model.eval()


@pytest.mark.parametrize("g", [Sigmoid(7.0), HardSigmoid(7.0)], ids=["sigmoid", "hard"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("estimator", ["ar", "arm", "disarm"])
def test_gradient_is_unbiased(estimator, per_sample, g):
    """Against enumeration over all gates, penalty included, for all parameters and φ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    bare, x, y = copy.deepcopy(model), torch.randn(6, 3).double(), torch.randint(2, (6,))
    space = search_space(model, x, levels=("channel",))
    options = {"estimator": estimator, "g": g, "lam": 0.02, "weight_decay": 0.3, "l1": 0.05, "initial": 0.4}
    gates = SpaceGates(space, per_sample=per_sample, **options).double()
    pi = gates.probabilities()
    rows = torch.cat([bare[0].weight, bare[0].bias[:, None]], 1)
    exact = 0.02 * 4 * pi.sum() + 0.15 * (pi[:, None] * rows.square()).sum()  # |g| = 4 elements
    exact = exact + 0.05 * (pi[:, None] * rows.abs()).sum()
    for z in itertools.product((0.0, 1.0), repeat=4):
        z = torch.tensor(z, dtype=torch.float64)
        weight = torch.where(z > 0, pi, 1 - pi).prod()
        exact = exact + weight * F.cross_entropy(bare[2](torch.tanh(bare[0](x)) * z), y)
    true = torch.autograd.grad(exact, [gates.phi, *bare.parameters()])
    draws = []
    for _ in range(500):
        gates.zero_grad()
        model.zero_grad()
        gates.backward(lambda: F.cross_entropy(gates(x), y, reduction="none" if per_sample else "mean"), batch_size=6)
        draws.append(torch.cat([p.grad.flatten() for p in (gates.phi, *model.parameters())]))
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - torch.cat([t.flatten() for t in true])).abs() <= 4.5 * error + 1e-9).all()


def test_per_sample_equals_one_example_at_a_time():
    _, x, _, gates = setting("attention")
    z = (torch.rand(3, len(gates.phi)) > 0.3).double()
    gates._z = z
    together = gates(x)
    for i in range(3):
        gates._z = z[i]
        torch.testing.assert_close(gates(x[i : i + 1])[0], together[i])


def test_running_statistics_are_those_of_the_open_structure():
    """A convolution before a batch norm is not multiplied: a closed gate does not reach the norm's statistics."""
    model, x, space, gates = setting("residual, batch norm")
    twin = copy.deepcopy(model).train()
    twin(x)
    gates._z = torch.ones(len(space), dtype=torch.float64)
    gates._z[space.position("blocks.0.conv-bn")] = 0.0
    _train_mode(gates, model, x)
    for name in ("blocks.0.bn.running_mean", "blocks.0.bn.running_var"):
        torch.testing.assert_close(model.get_buffer(name), twin.get_buffer(name))


@pytest.mark.parametrize("method", ["hc", "ar", "arm", "disarm"])
def test_single_weights(method):
    model, x, space, gates = _weights(method)
    assert len(gates.phi) == 8 * 5 + 7 * 8 + 3 * 7
    y = torch.randint(3, (6,))
    before = gates.phi.detach().clone()
    opt = torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.05)
    for _ in range(3):
        opt.zero_grad()
        gates.backward(lambda: F.cross_entropy(gates(x), y))
        opt.step()
    assert not torch.equal(before, gates.phi)
    randomize(gates, 3.0)
    gated, solution = gates(x), gates.solution()
    assert set(solution.masks) == {"0.weight", "2.weight", "4.weight"}
    assert solution.removed == ()
    gates.finish()
    torch.testing.assert_close(construct(space, solution)(x), gated)
    for name, mask in solution.masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].all()


def _weights(method):
    torch.manual_seed(0)
    model, x = perceptron().double(), torch.randn(6, 5, dtype=torch.float64)
    space = search_space(model, x, levels=("channel",))
    return model, x, space, SpaceGates(space, levels=("weight",), estimator=method, lam=0.1).double()


def test_kernels_and_channels_together():
    _, x, space, gates = setting("residual, batch norm", levels=("channel", "kernel"))
    randomize(gates)
    gated, solution = gates(x), gates.solution()
    assert {space[n].level for n in solution.removed} == {"channel", "kernel"}
    gates.finish()
    torch.testing.assert_close(construct(space, solution)(x), gated, rtol=1e-9, atol=1e-10)


def test_some_families_alone():
    """What has no gate stays as it is."""
    torch.manual_seed(0)
    model, x = perceptron().double(), torch.randn(6, 5, dtype=torch.float64)
    space = search_space(model, x, levels=("channel",))
    gates = SpaceGates(space, families=["2"]).double()
    assert len(gates.phi) == 7
    randomize(gates)
    gated, solution = gates(x), gates.solution()
    assert solution.removed
    assert all(name.startswith("2[") for name in solution.removed)
    gates.finish()
    torch.testing.assert_close(construct(space, solution)(x), gated)


def test_the_network_survives_gates_that_all_close():
    """One structure per family stays, the likeliest, and the gated model says so as the constructed one does."""
    _, x, space, gates = setting("attention")
    with torch.no_grad():
        gates.phi.copy_(-1.0 - torch.rand(gates.phi.shape))
    gated, solution = gates(x), gates.solution()
    assert 0 < len(solution.removed) < len(space)
    best = gates.by_site(gates.phi)
    open_ = gates.by_site(gates.expected() > 0)
    for name, values in best.items():
        if len(values) > 1:
            assert open_[name].nonzero().flatten().tolist() == [int(values.argmax())]
    gates.finish()
    torch.testing.assert_close(construct(space, solution)(x), gated, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["hc", "arm"])
@pytest.mark.parametrize("name", ["residual, batch norm", "two branches", "squeeze and excite", "shared layer", "demo"])
def test_conditional_computation_changes_nothing(name, method):
    """Loss and gradients with closed segments left out equal those with their parameters multiplied by 0."""
    found = []
    for conditional in (True, False):
        model, x, _, gates = setting(name, levels=("segment",), estimator=method, lam=0.1, conditional=conditional)
        assert (gates._skipping is not None) == conditional
        with torch.no_grad():
            gates.phi[::2] = -2.0
        model.train()
        loss = gates.backward(lambda g=gates, x=x: g(x).square().mean())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (gates.phi, *model.parameters())]
        found.append([loss, *grads, gates(x)])  # norms by the batch: what is left out updates no running statistics
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_expected_macs():
    """Of a perceptron by hand, and of two branches by enumeration."""
    model = perceptron()
    gates = SpaceGates(search_space(model, torch.randn(2, 5), levels=("channel",)))
    randomize(gates, 0.2)
    a, b = (pi.sum().item() for pi in gates.by_site(gates.probabilities().detach()).values())
    assert gates.expected_macs() == pytest.approx((5 * a + a * b + b * 3) / (5 * 8 + 8 * 7 + 7 * 3), rel=1e-5)
    space = search_space(TwoBranches(), torch.randn(2, 4))
    gates = SpaceGates(space, initial={"a": 0.3, "b": 0.6})
    (a,), (b,) = (pi.tolist() for pi in gates.by_site(gates.probabilities().detach()).values())
    assert gates.expected_macs() == pytest.approx((16 * a + 16 * b + 8) / 40, rel=1e-5)


def test_lambda_per_family_and_sizes():
    model = perceptron()
    space = search_space(model, torch.randn(2, 5), levels=("channel",))
    lam = {"0": 3.0, "2": 5.0}
    gates = SpaceGates(space, lam=lam, examples=100, initial={"0": 0.25, "2": 0.75})
    pi = gates.by_site(gates.probabilities())
    expected = (3.0 * 6 * pi["0"].sum() + 5.0 * 9 * pi["2"].sum()) / 100
    assert gates.penalty().item() == pytest.approx(expected.item(), rel=1e-5)
    assert pi["0"].mean().item() == pytest.approx(0.25, abs=0.01)


def test_training_a_convnet_leaves_an_exact_sub_network():
    model, x, space, gates = setting("residual, batch norm", lam=0.5, examples=10, estimator="arm")
    y = torch.randint(5, (4,))
    opt = torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.05)
    model.train()
    for _ in range(30):
        opt.zero_grad()
        gates.backward(lambda: F.cross_entropy(gates(x), y))
        opt.step()
    model.eval()
    gated, solution = gates(x), gates.solution()
    assert solution.removed
    gates.finish()
    torch.testing.assert_close(construct(space, solution)(x), gated, rtol=1e-8, atol=1e-9)


def test_resume_is_bit_identical():
    def make():
        model, x, _, gates = setting("attention", lam=0.1)
        return model, x, gates, torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.05)

    def train(gates, opt, x, steps):
        for _ in range(steps):
            opt.zero_grad()
            gates.backward(lambda: F.cross_entropy(gates(x), torch.tensor([0, 1, 2])))
            opt.step()

    model, x, gates, opt = make()
    train(gates, opt, x, 4)
    half, _, half_gates, half_opt = make()
    train(half_gates, half_opt, x, 2)
    rest, _, rest_gates, rest_opt = make()
    rest.load_state_dict(half.state_dict())
    rest_gates.load_state_dict(half_gates.state_dict())
    rest_opt.load_state_dict(half_opt.state_dict())
    train(rest_gates, rest_opt, x, 2)
    assert torch.equal(gates.phi, rest_gates.phi)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rest.parameters(), strict=True))


def test_bad_input():
    model = perceptron()
    space = search_space(model, torch.randn(2, 5), levels=("channel",))
    with pytest.raises(SpaceError, match="no level 'head': it has channel, and there is 'weight'"):
        SpaceGates(space, levels=("head",))
    with pytest.raises(SpaceError, match="no family of the search space is called '1'; there are 0, 2"):
        SpaceGates(space, families=["1"])
    with pytest.raises(SpaceError, match=r"'9\.weight' is no parameter"):
        SpaceGates(space, weights=["9.weight"])
    with pytest.raises(TrainingError, match="unknown estimator 'reinforce'"):
        SpaceGates(space, estimator="reinforce")
    with pytest.raises(TrainingError, match="no site's name; the sites are 0, 2"):
        SpaceGates(space, lam={"1": 1.0})
    empty = search_space(nn.Linear(3, 2), torch.randn(2, 3), levels=("channel",))
    with pytest.raises(SpaceError, match="nothing to gate"):
        SpaceGates(empty)
    frozen = perceptron().requires_grad_(False)
    space = search_space(frozen, torch.randn(2, 5), levels=("channel",))
    with pytest.raises(TrainingError, match=r"frozen \(requires_grad=False\)"):
        SpaceGates(space)
    with pytest.raises(TrainingError, match=r"frozen \(requires_grad=False\)"):
        SpaceGates(space, levels=("weight",), weights=["0.weight"])
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    space = search_space(normed, torch.randn(3, 3), levels=("channel",))
    gates = SpaceGates(space, per_sample=True)
    with pytest.raises(TrainingError, match="'1' averages over the batch"):
        gates.backward(lambda: gates(torch.randn(3, 3)).sum(1), batch_size=3)
