"""Random networks whose axes are coupled in every way that we know."""

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SqueezeExcite(nn.Module):
    """x times a gate per channel; the gate of a removed channel is a half, times zero."""

    def __init__(self, width: int, gate: str):
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(torch, self.gate)(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Shuffle(nn.Module):
    """ShuffleNet's unit: half of the channels passes, the other half is worked on, then they are shuffled."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat([left, self.branch(right)], 1)
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Concatenation(nn.Module):
    """Two branches side by side."""

    def __init__(self, width: int, norm: bool):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 3, 3, padding=1), nn.Conv2d(width, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(7) if norm else nn.Identity()
        self.out = nn.Conv2d(7, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.norm(torch.cat([self.a(x), self.b(x)], 1))))


class Tokens(nn.Module):
    """A transformer block over the positions; ``kind`` says how the heads are written."""

    def __init__(self, width: int, kind: str, norm: str):
        super().__init__()
        self.kind, self.heads, self.size = kind, 2, 3
        inner = self.heads * self.size
        self.norm = nn.LayerNorm(width) if norm == "layer" else nn.RMSNorm(width)
        shared = 1 if kind == "grouped" else self.heads
        self.qkv = nn.Linear(width, inner + 2 * shared * self.size)
        self.shared = shared
        self.out = nn.Linear(inner, width)
        self.after = nn.LayerNorm(width, elementwise_affine=norm == "layer")
        self.up, self.gate, self.down = nn.Linear(width, 6), nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        y = self.qkv(self.norm(x))
        wide = self.heads * self.size
        q, k, v = y.split([wide, self.shared * self.size, self.shared * self.size], -1)
        q, k, v = (t.view(b, h * w, -1, self.size).transpose(1, 2) for t in (q, k, v))
        if self.kind == "by_hand":
            z = torch.softmax(q @ k.transpose(-2, -1) / self.size**0.5, -1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kind == "grouped")
        x = x + self.out(z.transpose(1, 2).reshape(b, h * w, wide))
        y = self.after(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x.transpose(1, 2).reshape(b, -1, h, w)


class Multihead(nn.Module):
    """``nn.MultiheadAttention`` over the positions."""

    def __init__(self, width: int, batch_first: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = x.flatten(2).permute(0, 2, 1) if self.batch_first else x.flatten(2).permute(2, 0, 1)
        y, _ = self.attention(y, y, y, need_weights=False)
        y = y.permute(0, 2, 1) if self.batch_first else y.permute(1, 2, 0)
        return x + y.reshape(b, -1, h, w)


class Scaled(nn.Module):
    """A raw parameter times the tensor, another added."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(1, width, 1, 1))
        self.beta = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


class Mixer(nn.Module):
    """A product of matrices over the positions, beside the channels."""

    def __init__(self, width: int, positions: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(positions, 5), nn.Linear(5, positions)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(y))).view(b, -1, h, w)


class Twice(nn.Module):
    """One layer called twice, its weight tied to a product at the end."""

    def __init__(self, width: int):
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(F.relu(self.layer(x.permute(0, 2, 3, 1)))) @ self.layer.weight
        return self.norm(y.permute(0, 3, 1, 2))


class Rearranged(nn.Module):
    """Data movement: depth to space and back, a roll, a flip, padding, stacking."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(width, 4 * width if kind == "shuffle" else width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        match self.kind:
            case "shuffle":
                return F.avg_pool2d(F.pixel_shuffle(y, 2), 2)
            case "roll":
                return torch.roll(y, (1, 2), (2, 3)).flip(3)
            case "stack":
                return torch.stack([x, y, x * 2], 0).sum(0)
            case "pad":
                return F.pad(y[:, 1:], (0, 0, 0, 0, 1, 0)) + x
            case _:
                return torch.einsum("bchw,kc->bkhw", y, self.conv.weight.flatten(1))


def layer(rng: random.Random, width: int, size: int) -> tuple[nn.Module, int]:
    """A random layer for [batch, width, size, size], and its output's width."""
    out = rng.choice([4, 6, 8])
    makers = [
        lambda: (nn.Conv2d(width, out, 3, padding=1), out),
        lambda: (nn.Sequential(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()), out),
        lambda: (nn.Conv2d(width, 2 * out, 3, padding=1, groups=2), 2 * out),
        lambda: (nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)), width),
        lambda: (nn.ConvTranspose2d(width, out, 3, padding=1), out),
        lambda: (Residual(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()), width),
        lambda: (Residual(nn.Conv2d(width, out, 1), nn.Sigmoid(), nn.Conv2d(out, width, 3, padding=1)), width),
        lambda: (nn.Sequential(nn.GroupNorm(2, width), nn.PReLU(width)), width),
        lambda: (nn.InstanceNorm2d(width, affine=rng.random() < 0.5), width),
        lambda: (SqueezeExcite(width, rng.choice(["sigmoid", "tanh"])), width),
        lambda: (Shuffle(width), width),
        lambda: (Concatenation(width, rng.random() < 0.5), width),
        lambda: (Tokens(width, rng.choice(["fused", "grouped", "by_hand"]), rng.choice(["layer", "rms"])), width),
        lambda: (Multihead(width, rng.random() < 0.5), width),
        lambda: (Scaled(width), width),
        lambda: (Mixer(width, size * size), width),
        lambda: (Twice(width), width),
        lambda: (Rearranged(width, rng.choice(["shuffle", "roll", "stack", "pad", "einsum"])), width),
        lambda: (nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Hardswish(), nn.AvgPool2d(3, 1, 1)), width),
        lambda: (nn.Softmax(rng.choice([1, 3])), width),
    ]  # fmt: skip
    return rng.choice(makers)()


class RandomChannels(nn.Module):
    """A stem, random layers and a head; float64, with norms and biases away from their defaults."""

    def __init__(self, seed: int, size: int = 4):
        super().__init__()
        torch.manual_seed(seed)
        rng = random.Random(seed)
        width, layers = 6, [nn.Conv2d(3, 6, 3, padding=1)]
        for _ in range(rng.randint(2, 6)):
            made, width = layer(rng, width, size)
            layers.append(made)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 3)
        self.flat = rng.random() < 0.3
        if self.flat:
            self.head = nn.Linear(width * size * size, 3)
        self.double()
        for name, buffer in self.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, 0.5, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y.flatten(1) if self.flat else y.mean((2, 3)))
