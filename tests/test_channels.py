"""Channels, heads and kernels: exactness on random networks, and what the coupled axes must be."""

import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_channels import RandomChannels
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.errors import InvalidSolution, SpaceError
from espalier.graph.movement import movements
from espalier.space.structure import Family, Slices

PARTS = 8
NETWORKS = int(os.environ.get("ESPALIER_NETWORKS", "160"))


def outputs(module: nn.Module, x: Tensor, training: bool) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(module).train(training)(x)


def assert_same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    for training in (False, True):
        torch.testing.assert_close(outputs(a, x, training), outputs(b, x, training), rtol=1e-8, atol=1e-9)


def check(seed: int) -> tuple[int, int]:
    """A random network, three random solutions over all levels; how much was narrowed of how much."""
    rng = random.Random(seed)
    net, x = RandomChannels(seed), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    levels = rng.choice([("channel", "head"), ("segment", "channel", "head"), ("channel", "kernel"), ("head",)])
    space = espalier.search_space(net, (x,), levels=levels)
    larger = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    assert_same(net, space.trace.graph_module, larger)
    full, left = space.cost().params, []
    for share in (0.2, 0.5, 1.0) if len(space) else ():
        names = list(space.structures.names)
        order = rng.sample(names, len(names))
        removed = space.removable_in_order(order, stop_at=max(1, round(share * len(order))))
        solution = space.solution(removed)
        small = espalier.construct(space, solution)
        assert_same(space.masked(solution), small, larger)
        left.append(sum(p.numel() for p in small.parameters()))
    return full, min(left, default=full)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks(part: int) -> None:
    narrowed = 0
    for seed in range(part, NETWORKS, PARTS):
        try:
            full, left = check(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        narrowed += left < full
    assert narrowed > NETWORKS // PARTS // 2


class Block(nn.Module):
    """A residual block with a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner, self.norm = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)
        self.outer = nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(torch.relu(self.norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


def family(space: espalier.SearchSpace, name: str) -> Family:
    return next(f for f in space.families if f.name == name)


def places(slices: tuple[Slices, ...]) -> set[tuple[str, int | None]]:
    return {(s.parameter, s.dim) for s in slices}


def test_what_goes_together_in_a_residual_block() -> None:
    space = espalier.search_space(Block(), torch.randn(2, 3, 4, 4), levels=("channel",))
    assert {f.name: len(f) for f in space.families} == {"stem": 6, "inner": 5}
    stream, inner = family(space, "stem"), family(space, "inner")
    assert places(stream.slices) == {("stem.weight", 0), ("stem.bias", 0), ("outer.weight", 0), ("outer.bias", 0)}
    assert places(stream.readers) == {("inner.weight", 1), ("head.weight", 1)}
    assert places(inner.slices) == {("inner.weight", 0), ("inner.bias", 0), ("norm.weight", 0), ("norm.bias", 0)}
    assert places(inner.readers) == {("outer.weight", 1)}
    owner = inner.slices[0].owner
    assert owner is not None
    assert owner.tolist() == [0, 1, 2, 3, 4]
    assert space["inner[3]"].parameters == ("inner.weight", "inner.bias", "norm.weight", "norm.bias")
    with pytest.raises(SpaceError, match=r"no structure is called 'inner\[5\]'"):
        space["inner[5]"]


def test_a_removed_channel_is_gone_from_layers_and_their_attributes() -> None:
    net, x = Block().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    space = espalier.search_space(net, x, levels=("channel",))
    solution = space.solution(["stem[1]", "inner[0]", "inner[4]"])
    small = espalier.construct(space, solution)
    assert type(small) is Block
    assert (small.stem.out_channels, small.inner.in_channels, small.inner.out_channels) == (5, 5, 3)
    assert (small.norm.num_features, small.outer.out_channels, small.head.in_features) == (3, 5, 5)
    assert torch.equal(small.outer.weight, net.outer.weight[[0, 2, 3, 4, 5]][:, [1, 2, 3]])
    assert_same(space.masked(solution), small, x)
    zeroed = copy.deepcopy(net)  # by hand: the parameters at zero
    with torch.no_grad():
        for parameter in (zeroed.stem.weight, zeroed.stem.bias, zeroed.outer.weight, zeroed.outer.bias):
            parameter[1] = 0
        for parameter in (zeroed.inner.weight, zeroed.inner.bias, zeroed.norm.weight, zeroed.norm.bias):
            parameter[[0, 4]] = 0
    assert_same(zeroed, small, x)


def test_a_family_keeps_at_least_one() -> None:
    space = espalier.search_space(Block(), torch.randn(2, 3, 4, 4), levels=("channel",))
    with pytest.raises(InvalidSolution, match="all 5 structures of 'inner' would go"):
        space.solution([f"inner[{i}]" for i in range(5)])
    assert len(space.removable_in_order(space.structures.names)) == 9


def test_an_unknown_operator_keeps_its_axes_and_says_where() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.cumprod(self.a(x), -1))))

    space = espalier.search_space(Net(), torch.randn(3, 4), levels=("channel",))
    assert [f.name for f in space.families] == ["b"]
    row = next(r for r in space.summary().rows if r.name == "a.weight, axis 0")
    assert not row.removable
    assert row.params == 20
    assert "cumprod" in row.reason
    assert "test_channels.py" in row.reason


def test_keep_protects_channels() -> None:
    space = espalier.search_space(Block(), torch.randn(2, 3, 4, 4), levels=("channel",), keep=["inner"])
    assert [f.name for f in space.families] == []
    assert any("keep=" in row.reason for row in space.summary().rows)


def test_query_heads_share_a_key_and_value_head() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
            self.o = nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = (t.view(b, n, -1, 3).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            y = F.scaled_dot_product_attention(q, k, v)
            return self.o(y.transpose(1, 2).reshape(b, n, -1))

    net, x = Grouped().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    space = espalier.search_space(net, x, levels=("head",))
    (heads,) = space.families
    assert (heads.level, len(heads)) == ("head", 2)
    owner = {s.parameter: s.owner for s in (*heads.slices, *heads.readers)}
    assert owner["q.weight"].tolist() == [0] * 6 + [1] * 6
    assert owner["k.weight"].tolist() == owner["v.weight"].tolist() == [0] * 3 + [1] * 3
    assert owner["o.weight"].tolist() == [0] * 6 + [1] * 6
    solution = space.solution([heads.name_of(0)])
    small = espalier.construct(space, solution)
    assert small.get_parameter("q.weight").shape == (6, 8)
    assert_same(space.masked(solution), small, x)


def test_a_sigmoid_leaves_a_half_which_goes_into_the_next_bias() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    space = espalier.search_space(net, x, levels=("channel",))
    small = espalier.construct(space, space.solution(["0[2]"]))
    torch.testing.assert_close(small[2].bias, net[2].bias + 0.5 * net[2].weight[:, 2])
    assert_same(space.masked(space.solution(["0[2]"])), small, x)


class Standardised(nn.Conv2d):
    """Every filter has mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


def test_filters_that_are_standardised() -> None:
    """They go; what reads them stays whole if it is standardised as well, since its statistics run over its inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(), Standardised(4, 2, 3)).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    space = espalier.search_space(net, x, levels=("channel",))
    assert [f.name for f in space.families] == ["0"]
    solution = space.solution(["0[1]", "0[6]"])
    small = espalier.construct(space, solution)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    assert_same(space.masked(solution), small, x)


class Empty(nn.Module):
    """Reads a slice without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(torch.cat([y, y[:, 8:]], 1))


def test_a_slice_without_elements() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    space = espalier.search_space(Empty().double(), x, levels=("channel",))
    assert_same(
        space.masked(s := space.solution([n for f in space.families for n in f.names[:3]])),
        espalier.construct(space, s),
        x,
    )


def test_a_layer_norm_averages_over_what_stays() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    space = espalier.search_space(net, x, levels=("channel",))
    solution = space.solution(["0[1]"])
    kept = [0, 2, 3]
    inner = F.layer_norm(net[0](x)[:, kept], (3,), net[1].weight[kept], net[1].bias[kept])
    expected = F.linear(inner, net[2].weight[:, kept], net[2].bias)
    torch.testing.assert_close(space.masked(solution)(x), expected)
    torch.testing.assert_close(espalier.construct(space, solution)(x), expected)


def test_kernels_are_masked() -> None:
    net, x = Block().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    space = espalier.search_space(net, x, levels=("kernel", "channel"))
    assert len(family(space, "stem.kernels")) == 18
    solution = space.solution(["stem.kernels[4,2]", "inner[1]"])
    small = espalier.construct(space, solution)
    assert not small.stem.weight[4, 2].any()
    assert small.stem.weight.shape == net.stem.weight.shape
    assert_same(space.masked(solution), small, x)


def test_a_reloaded_network_does_the_same(tmp_path: Path) -> None:
    net, x = RandomChannels(3), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    space = espalier.search_space(net, x, levels=("channel", "head"))
    solution = space.sample(espalier.Budget(structures=0.6), torch.Generator().manual_seed(0))
    solution.save(tmp_path / "solution.safetensors")
    assert espalier.Solution.load(tmp_path / "solution.safetensors").removed == solution.removed
    small = espalier.construct(space, solution).eval()
    expected = small(x)
    espalier.save(small, tmp_path / "small")
    torch.testing.assert_close(espalier.load(tmp_path / "small").eval()(x), expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(copy.deepcopy(small)(x), expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), expected)
    compiled = torch.compile(small, backend="aot_eager")  # no C++ compiler is needed
    torch.testing.assert_close(compiled(x), expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2**16))
def test_movements_against_a_plain_loop(shape: list[int], seed: int) -> None:
    """A dim of the result that depends on one dim of the source carries its labels index by index."""
    rng = random.Random(seed)
    steps = [lambda t: t.permute(rng.sample(range(t.ndim), t.ndim)), lambda t: t.flatten(rng.randrange(t.ndim)),
             lambda t: t.unsqueeze(rng.randrange(t.ndim + 1)), lambda t: t.flip(rng.randrange(t.ndim)),
             lambda t: t.roll(1, rng.randrange(t.ndim)), lambda t: t.narrow(0, t.shape[0] // 2, 1)]  # fmt: skip
    chosen = [rng.choice(steps) for _ in range(2)]
    state = rng.getstate()

    def operator(t: Tensor) -> Tensor:
        rng.setstate(state)
        for step in chosen:
            t = step(t)
        return t

    (move,) = movements(tuple(shape), operator)
    coordinates = [operator(torch.arange(n).view(*[-1 if k == d else 1 for k in range(len(shape))]).expand(shape))
                   for d, n in enumerate(shape)]  # fmt: skip
    for dim in range(len(shape)):
        assert (move.digit(dim) == coordinates[dim].numpy()).all()
        lines = move.depends(move.digit(dim))
        varies = {q for q in range(move.source.ndim)
                  if (coordinates[dim] != coordinates[dim].narrow(q, 0, 1)).any()}  # fmt: skip
        assert lines is None or set(lines) == varies


@pytest.mark.parametrize("seed", [3, 5, 11])
def test_onnx_of_a_narrowed_network(seed: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = RandomChannels(seed).float().eval(), torch.randn(2, 3, 4, 4)
    space = espalier.search_space(net, x, levels=("channel", "head"))
    small = espalier.construct(space, space.sample(espalier.Budget(structures=0.5), torch.Generator().manual_seed(0)))
    espalier.export_onnx(small, (x,), tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(x), rtol=1e-4, atol=1e-5)


def test_a_narrowed_network_is_read_in_another_process(tmp_path: Path) -> None:
    net, x = RandomChannels(3).eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    space = espalier.search_space(net, x, levels=("channel", "head"))
    small = espalier.construct(space, space.sample(espalier.Budget(structures=0.5), torch.Generator().manual_seed(0)))
    espalier.save(small, tmp_path / "small")
    torch.save({"x": x, "y": small(x)}, tmp_path / "pair.pt")
    code = (
        "import sys, torch, espalier; from pathlib import Path; root = Path(sys.argv[1]);"
        "pair = torch.load(root / 'pair.pt'); net = espalier.load(root / 'small').eval();"
        "assert torch.equal(net(pair['x']), pair['y'])"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": path})


def test_the_encoder_layer_of_torch() -> None:
    """Its fused kernel in eval mode must not pass over norms that average over what stays."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Linear(5, 12), layer, nn.Linear(12, 2)).double().eval()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    space = espalier.search_space(net, x, levels=("channel", "head"))
    solution = space.solution([f.name_of(i) for f in space.families for i in range(len(f) // 2)])
    small = espalier.construct(space, solution)
    assert_same(space.masked(solution), small, x)
    with torch.no_grad():
        torch.testing.assert_close(space.masked(solution).eval()(x), small.eval()(x))


def test_macs_are_counted_in_any_mode() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)).train(), torch.randn(2, 3, 6, 6)
    space = espalier.search_space(net, x, levels=("channel",))
    net.train()
    assert space.macs_by_weight() == {"0.weight": 16 * 8 * 27, "2.weight": 16 * 16}
    assert int(net[1].num_batches_tracked) == 0
    assert net.training


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed_from_others_stay_and_it_says_why(wrap) -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), wrap(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 2)
    )
    x = torch.randn(3, 4, dtype=torch.float64)
    space = espalier.search_space(model.eval().double(), x, levels=("channel",))
    assert [f.name for f in space.families] == ["4"]
    text = str(space.summary())
    assert "weight_norm" in text
    assert "module '2" in text
    if wrap is nn.utils.weight_norm:
        return  # torch itself cannot copy such a model, and says so
    removed = ["4[1]", "4[3]"]
    small = espalier.construct(space, space.solution(removed))
    torch.testing.assert_close(small(x), space.masked(space.solution(removed))(x))
    rigid = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), wrap(nn.Linear(8, 8))).eval().double()
    with pytest.raises(SpaceError, match="axis 0': "):
        espalier.prune(rigid, x, budget=espalier.Budget(params=0.5))
