"""Random networks: branches, sums, products, concatenations, shared layers, pools, several inputs and outputs."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 4
SIZE = 6

UNARY = (
    "conv3", "conv1", "conv_pad_valid", "depthwise", "functional_conv", "bn", "bn_plain", "group_norm", "layer_norm",
    "relu", "relu_in_place", "sigmoid", "gelu", "max_pool", "avg_pool", "scale", "plus_one", "shared", "dropout",
    "in_place_mul", "view_round_trip",
)  # fmt: skip
JOINT = ("add", "add_in_place", "mul", "cat", "stack_sum", "sub", "alpha_add")


@dataclass(frozen=True)
class Step:
    """One operation: what it does, which earlier tensors it reads, and how often its result is read at least."""

    kind: str
    left: int
    right: int


@dataclass(frozen=True)
class Program:
    """A network as data; ``heads`` are the tensors that are returned, pooled by a linear layer."""

    inputs: int
    steps: tuple[Step, ...]
    heads: tuple[int, ...]
    seed: int


@st.composite
def programs(draw: st.DrawFn) -> Program:
    inputs = draw(st.integers(1, 2))
    count = draw(st.integers(3, 16))
    steps = []
    for i in range(count):
        available = inputs + i
        joint = i > 1 and draw(st.integers(0, 9)) < 4
        kind = draw(st.sampled_from(JOINT if joint else UNARY))
        near = st.integers(max(0, available - 4), available - 1)
        steps.append(Step(kind, draw(near), draw(near)))
    total = inputs + count
    heads = draw(st.lists(st.integers(max(0, total - 4), total - 1), min_size=0, max_size=2, unique=True))
    return Program(inputs, tuple(steps), tuple(dict.fromkeys([*heads, total - 1])), draw(st.integers(0, 2**16)))


class RandomNet(nn.Module):
    """Runs a :class:`Program`; every tensor between the steps has CHANNELS channels, save after a concatenation."""

    def __init__(self, program: Program):
        super().__init__()
        torch.manual_seed(program.seed)
        self.program = program
        self.layers = nn.ModuleDict()
        self.scales = nn.ParameterDict()
        if any(step.kind == "shared" for step in program.steps):
            self.shared = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        for i, step in enumerate(program.steps):
            layer = _layer(step.kind)
            if layer is not None:
                self.layers[str(i)] = layer
            if step.kind == "cat":
                self.layers[f"{i}_bn"] = nn.BatchNorm2d(2 * CHANNELS)
                self.layers[str(i)] = nn.Conv2d(2 * CHANNELS, CHANNELS, 1 + 2 * (i % 2), padding=i % 2)
            if step.kind == "scale":
                self.scales[str(i)] = nn.Parameter(torch.randn(1, CHANNELS, 1, 1))
            if step.kind == "functional_conv":
                self.scales[str(i)] = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3) / 6)
        self.heads = nn.ModuleList(nn.Linear(CHANNELS, 3) for _ in program.heads)
        for buffer_name, buffer in self.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3)
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, 0.0, 0.3)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs)
        for i, step in enumerate(self.program.steps):
            values.append(self.step(i, step, values[step.left], values[step.right]))
        pooled = [values[h].mean((2, 3)) for h in self.program.heads]
        return tuple(head(x) for head, x in zip(self.heads, pooled, strict=True))

    def step(self, i: int, step: Step, x: Tensor, y: Tensor) -> Tensor:
        kind = step.kind
        if kind == "cat":
            joined = torch.cat([x, y], dim=1)
            if i % 3:
                joined = self.layers[f"{i}_bn"](joined).relu()
            return self.layers[str(i)](joined)
        if kind == "functional_conv":
            return F.conv2d(x, self.scales[str(i)], padding=1)
        if kind == "scale":
            return x * self.scales[str(i)]
        if kind == "layer_norm":
            return self.layers[str(i)](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if kind == "shared":
            return self.shared(x)
        if str(i) in self.layers:
            return self.layers[str(i)](x)
        return _function(kind, x, y)


def _function(kind: str, x: Tensor, y: Tensor) -> Tensor:
    match kind:
        case "sigmoid":
            return torch.sigmoid(x)
        case "plus_one":
            return 1 + x
        case "in_place_mul":
            z = x.clone()
            z[:, :2].mul_(0.5)
            return z
        case "view_round_trip":
            return x.flatten(1).view(-1, CHANNELS, SIZE, SIZE)
        case "add":
            return x + y
        case "add_in_place":
            z = x + 0.5
            z += y
            return z
        case "alpha_add":
            return torch.add(x, y, alpha=0.5)
        case "sub":
            return x - y
        case "mul":
            return x * y
        case "stack_sum":
            return torch.stack([x, y, x]).sum(0)
    raise AssertionError(kind)


def _layer(kind: str) -> nn.Module | None:
    match kind:
        case "conv3":
            return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        case "conv1":
            return nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        case "conv_pad_valid":
            return nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(CHANNELS, CHANNELS, 3))
        case "depthwise":
            return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        case "bn":
            return nn.BatchNorm2d(CHANNELS)
        case "bn_plain":
            return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS, affine=False))
        case "group_norm":
            return nn.GroupNorm(2, CHANNELS)
        case "layer_norm":
            return nn.LayerNorm(CHANNELS)
        case "relu":
            return nn.ReLU()
        case "relu_in_place":
            return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(inplace=True))
        case "gelu":
            return nn.GELU()
        case "max_pool":
            return nn.MaxPool2d(3, 1, 1)
        case "avg_pool":
            return nn.AvgPool2d(3, 1, 1)
        case "dropout":
            return nn.Dropout(0.0)
    return None


def network(program: Program) -> tuple[RandomNet, tuple[Tensor, ...]]:
    """The network in float64 and example inputs for it."""
    net = RandomNet(program).double()
    return net, tuple(torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64) for _ in range(program.inputs))
