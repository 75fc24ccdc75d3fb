"""Gates on segments of every kind: at 0 the segment removed, between 0 and 1 its output times the gate, once."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier import construct, search_space
from espalier.errors import TrainingError
from espalier.sparsify import SpaceGates

WIDTH = 8
TOKENS, IMAGES = (3, 5, 4), (3, 4, 6, 6)


class Beside(nn.Module):
    """A branch beside a skip; ``times`` is where an oracle multiplies the branch's output."""

    def __init__(self, branch: nn.Module, images: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, WIDTH, 3, padding=1) if images else nn.Linear(4, WIDTH)
        self.branch, self.times, self.out = branch, nn.Identity(), nn.Linear(WIDTH, 3)
        self.places = (2, 3) if images else (1,)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out((x + self.times(self.branch(x))).mean(self.places))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.inner(y, y, y, need_weights=False)[0]


class Raw(nn.Module):
    """Parameters that no layer holds, read by an operator."""

    def __init__(self, read: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.read = nn.Linear(WIDTH, WIDTH, bias=False), read
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias, self.gamma = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.f(x), self.weight, self.bias, self.gamma)


class Encoder(nn.Module):
    """torch's own encoder layer; its two segments end in its dropouts."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.stem(x)).mean(1))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def chain(*layers: nn.Module) -> nn.Module:
    return Beside(nn.Sequential(*layers))


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def convolution() -> nn.Module:
    layers = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(3, 1, 1)
    return Beside(nn.Sequential(*layers), images=True)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: chain(linear(), nn.GELU(), linear()),
    "linear and relu": lambda: chain(nn.LayerNorm(WIDTH), linear(), nn.ReLU()),
    "linear and prelu": lambda: chain(linear(), nn.PReLU()),
    "layer norm": lambda: chain(linear(), nn.Tanh(), nn.LayerNorm(WIDTH)),
    "rms norm": lambda: chain(linear(), nn.RMSNorm(WIDTH)),
    "convolution and batch norm": convolution,
    "attention": lambda: Beside(Attention()),
    "encoder, norm first": lambda: Encoder(True),
    "encoder, norm last": lambda: Encoder(False),
    "raw bias": lambda: Beside(Raw(lambda x, w, b, g: x + b)),
    "raw bias, then relu": lambda: Beside(Raw(lambda x, w, b, g: (x + 2 * b).relu())),
    "raw scale": lambda: Beside(Raw(lambda x, w, b, g: F.gelu(x) * g)),
    "raw scale and bias": lambda: Beside(Raw(lambda x, w, b, g: x * (0.5 * g).view(1, -1) - b)),
    "scale of one and more": lambda: Beside(Raw(lambda x, w, b, g: x * (1 + g))),
    "raw linear": lambda: Beside(Raw(lambda x, w, b, g: F.linear(x, w.t(), b))),
    "raw product": lambda: Beside(Raw(lambda x, w, b, g: x @ w + b)),
    "raw einsum": lambda: Beside(Raw(lambda x, w, b, g: torch.einsum("btc,dc->btd", x, w))),
    "raw norm": lambda: Beside(Raw(lambda x, w, b, g: F.layer_norm(x, (WIDTH,), g, b))),
}


@pytest.fixture(autouse=True)
def no_fast_path():
    """torch's encoder layer in eval mode passes by the dropouts that the oracle replaces."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def setting(kind: str, weights: str, **options):
    """Gates made while every bias and raw scale is 0, as after initialisation; then random weights, or trained ones."""
    torch.manual_seed(0)
    model, x = KINDS[kind]().double(), torch.randn(IMAGES if "conv" in kind else TOKENS, dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    space = search_space(model, x)
    gates = SpaceGates(space, **options).double()
    if weights == "random":
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5 * torch.randn_like(p))
            model(x)
    else:
        opt = torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.05)
        for _ in range(5):
            opt.zero_grad()
            gates.backward(lambda: F.cross_entropy(gates(x), torch.tensor([0, 1, 2])))
            opt.step()
    return model.eval(), x, space, gates


def multiplied(model: nn.Module, space, values: dict[str, float]) -> nn.Module:
    """A copy whose segments' outputs are multiplied."""
    twin = copy.deepcopy(model)
    for name, factor in values.items():
        if not isinstance(model, Encoder):
            twin.times = Times(factor)
        elif "self_attn" in name:
            twin.layer.dropout1 = Times(factor)
        else:
            twin.layer.dropout2 = Times(factor)
    return twin


both = pytest.mark.parametrize("weights", ["random", "trained"])
every = pytest.mark.parametrize("kind", KINDS)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@both
@every
def test_a_gate_multiplies_the_output_once_and_at_0_removes_the_segment(kind: str, weights: str) -> None:
    model, x, space, gates = setting(kind, weights)
    for k, structure in enumerate(space.structures):
        for value in (0.5, 0.9, 0.0):
            gates._z = torch.ones(len(gates.phi), dtype=torch.float64)
            gates._z[k] = value
            close(gates(x), multiplied(model, space, {structure.name: value})(x))
        close(gates(x), construct(space, space.solution([structure.name])).eval()(x))


@both
@every
def test_gates_are_folded_as_they_are(kind: str, weights: str) -> None:
    """Kept at their π, Eq. (14), in the gated network, in the folded one and in the constructed one."""
    model, x, space, gates = setting(kind, weights)
    with torch.no_grad():
        gates.phi.fill_(0.1)
        if len(gates.phi) > 1:
            gates.phi[0] = -1.0
    gated, solution = gates(x), gates.solution()
    values = dict(zip(space.structures.names, gates.expected().tolist(), strict=True))
    assert len(solution.removed) == len(gates.phi) - 1
    assert max(values.values()) < 1
    close(gated, multiplied(model, space, values)(x))
    close(gates.finish()(x), gated)
    close(construct(space, solution).eval()(x), gated)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Twice(nn.Module):
    """One layer twice in a row: a factor on its parameters comes in twice."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.f(x).relu())


@pytest.mark.parametrize("branch", [Recurrent, Twice])
def test_where_no_parameters_multiply_the_output_gates_are_0_or_1(branch: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Beside(branch()).double(), torch.randn(TOKENS, dtype=torch.float64)
    space = search_space(model, x)
    (name,) = space.structures.names
    with pytest.raises(TrainingError, match=f"'{name}' multiply its output once.* take estimator='arm'"):
        SpaceGates(space, estimator="hc")
    for phi, value in ((0.1, 1.0), (-0.1, 0.0)):
        with pytest.warns(UserWarning, match=f"'{name}' multiply its output once.* is 1 there"):
            gates = SpaceGates(space).double()
        plain = copy.deepcopy(model)
        with torch.no_grad():
            gates.phi.fill_(phi)
        gated, solution = gates(x), gates.solution()
        assert gates.expected().tolist() == [value]
        close(gated, multiplied(plain, space, {name: value})(x))
        close(construct(space, solution)(x), gated)
        close(gates.finish()(x), gated)


def test_what_lies_behind_the_last_linear_operator_acts_on_the_product() -> None:
    """A sigmoid without its layer is a half, and stays one."""
    torch.manual_seed(0)
    model, x = chain(linear(), nn.Sigmoid()).double(), torch.randn(TOKENS, dtype=torch.float64)
    space = search_space(model, x)
    gates = SpaceGates(space, estimator="hc").double()
    for value in (0.0, 0.5):
        gates._z = torch.full((1,), value, dtype=torch.float64)
        twin = copy.deepcopy(model)
        twin.branch.insert(1, Times(value))
        close(gates(x), twin(x))
    gates._z = torch.zeros(1, dtype=torch.float64)
    close(gates(x), construct(space, space.solution(list(space.structures.names)))(x))


def test_a_bias_that_is_frozen_stays() -> None:
    """The removed segment leaves it; a gate multiplies the rest."""
    torch.manual_seed(0)
    model, x = chain(linear(), linear()).double(), torch.randn(TOKENS, dtype=torch.float64)
    last = model.branch[1]
    last.bias.requires_grad_(False)
    space = search_space(model, x)
    gates = SpaceGates(space).double()
    for value in (0.0, 0.5):
        gates._z = torch.full((1,), value, dtype=torch.float64)
        twin = copy.deepcopy(model)
        twin.branch[1].weight.data.mul_(value)
        close(gates(x), twin(x))
    gates._z = torch.zeros(1, dtype=torch.float64)
    close(gates(x), construct(space, space.solution(list(space.structures.names)))(x))


def test_a_bias_that_is_frozen_meets_a_parameter_that_is_not_multiplied() -> None:
    """The slope of the PReLU then counts when the gate is closed, and must go as well."""
    torch.manual_seed(0)
    model, x = chain(linear(), nn.PReLU()).double(), torch.randn(TOKENS, dtype=torch.float64)
    model.branch[0].bias.requires_grad_(False)
    space = search_space(model, x)
    with pytest.warns(UserWarning, match="is 1 there"):
        gates = SpaceGates(space).double()
    gates._z = torch.zeros(1, dtype=torch.float64)
    close(gates(x), construct(space, space.solution(list(space.structures.names)))(x))
