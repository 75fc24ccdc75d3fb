"""Gates on whole models: what training left is folded and built exactly, and finish() says the same."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_space_gates import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from espalier import construct, search_space
from espalier.data._torchvision import import_torchvision
from espalier.sparsify import SpaceGates

Made = tuple[nn.Module, dict[str, Tensor]]


def resnet18() -> Made:
    model = import_torchvision().models.resnet18(num_classes=3)
    return model, {"x": torch.randn(4, 3, 32, 32)}


def transformer() -> Made:
    return Attention(), {"x": torch.randn(4, 6, 5)}


def encoder() -> Made:
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Linear(7, 24), layer, nn.Flatten(), nn.Linear(72, 3)), {"input": torch.randn(4, 3, 7)}


def bert() -> Made:
    import_torchvision()  # transformers imports it, and it needs its operators declared before
    transformers: Any = importlib.import_module("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=48, max_position_embeddings=16, num_labels=3)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[:, 8:] = 0
    kwargs = {"input_ids": torch.randint(50, (4, 12)), "attention_mask": mask}
    return transformers.BertForSequenceClassification(config), kwargs


@pytest.mark.parametrize("estimator", ["arm", "hc"])
@pytest.mark.parametrize("make", [resnet18, transformer, encoder, bert])
def test_trained_gates_are_folded_exactly(make: Callable[[], Made], estimator: str) -> None:
    torch.manual_seed(0)
    model, kwargs = make()
    space = search_space(model.eval(), (), kwargs, levels=("channel", "head"))
    gates = SpaceGates(space, estimator=estimator, lam=1.0, examples=10, seed=1)
    optimizer = torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.01)

    def logits(network: nn.Module) -> Tensor:
        out = network(**kwargs)
        return out if isinstance(out, Tensor) else out.logits

    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        gates.backward(lambda: F.cross_entropy(logits(gates), torch.tensor([0, 1, 2, 0])))
        optimizer.step()
    model.eval()
    with torch.no_grad():
        gates.phi[::2] = gates.phi[::2].minimum(torch.tensor(-3.0))
        gated, solution = logits(gates), gates.solution()
        finished = gates.finish().eval()
        small = construct(space, solution).eval()
        assert len(solution.removed) > len(space) / 4
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        for network in (finished, small, gates):
            torch.testing.assert_close(logits(network), gated, rtol=0.0, atol=1e-5)
        assert (finished is model) == (make is resnet18)
