"""Pruning in one call."""

import pytest
import torch
from test_reconstruct import Small, batches
from torch import Tensor, nn

import espalier
from espalier.errors import BudgetError, SpaceError
from espalier.select.families import FamilyOptions
from espalier.space.cost import measure


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().double().eval()


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.arange(16) % 3) for x in batches()]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("saliency", ["magnitude", "bn_scale", "random"])
def test_without_data(model: nn.Module, saliency: str) -> None:
    x = batches()[0]
    small = espalier.prune(model, x, budget=espalier.Budget(params=0.6), saliency=saliency)
    assert type(small) is Small
    assert parameters(small) <= 0.6 * parameters(model)
    assert small(x).shape == model(x).shape


@pytest.mark.parametrize("saliency", ["taylor", "cosine_magnitude"])
def test_with_gradients(model: nn.Module, saliency: str) -> None:
    x = batches()[0]
    before = [p.clone() for p in model.parameters()]
    small = espalier.prune(model, x, budget=espalier.Budget(macs=0.5), saliency=saliency, data=labelled())
    assert measure(small, (x,)).macs <= 0.5 * measure(model, (x,)).macs
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(SpaceError, match="data="):
        espalier.prune(model, x, budget=espalier.Budget(macs=0.5), saliency="taylor")


def test_magnitude_takes_the_smallest_group() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, 0, 0], [1, 0, 0], [4, 0, 0], [2, 0, 0]]))
        net[0].bias.zero_()
    small = espalier.prune(net, torch.rand(2, 3), budget=espalier.Budget(structures=0.5))
    assert torch.equal(small[0].weight[:, 0], torch.tensor([3.0, 4.0]))


def test_by_reconstruction(model: nn.Module) -> None:
    x = batches()[0]
    small = espalier.prune(model, x, budget=espalier.Budget(macs=0.8), method="omp", data=batches())
    assert measure(small, (x,)).macs <= 0.8 * measure(model, (x,)).macs
    with pytest.raises(SpaceError, match="calibration"):
        espalier.prune(model, x, budget=espalier.Budget(macs=0.8), method="omp")
    with pytest.raises(SpaceError, match="there are"):
        espalier.prune(model, x, budget=espalier.Budget(macs=0.8), method="nothing")


def test_steps_with_fine_tuning(model: nn.Module) -> None:
    x, sizes = batches()[0], []
    small = espalier.prune(
        model, x, budget=espalier.Budget(params=0.5), steps=3, finetune=lambda net: sizes.append(parameters(net))
    )
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == parameters(small) <= 0.5 * parameters(model)


def test_kernels_stay_zero_in_fine_tuning(model: nn.Module) -> None:
    x = batches()[0]

    def train(net: nn.Module) -> None:
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()

    budget = espalier.Budget(structures=0.5)
    small = espalier.prune(model, x, budget=budget, levels=("kernel",), steps=2, finetune=train)
    kernels = [m.weight.flatten(2) for m in small.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    dead = sum(int((w == 0).all(2).sum()) for w in kernels)
    assert dead >= 0.5 * sum(w.shape[0] * w.shape[1] for w in kernels) > 0


def test_a_budget_out_of_reach(model: nn.Module) -> None:
    with pytest.raises(BudgetError, match="the least is"):
        espalier.prune(model, batches()[0], budget=espalier.Budget(params=0.01))


def zeros(net: nn.Module) -> float:
    weights = [m.weight for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("method", [None, "chita", "chita++", "exchange++", "woodfisher", "mfac", "cbs"])
def test_single_weights(method: str | None) -> None:
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), torch.rand(300, 4), torch.arange(300) % 3
    options = {"n": 50, "batch": 4}
    small = espalier.prune(
        net, x[:2], budget=espalier.Budget(weights=0.25), method=method, data=(x, y), options=options
    ) if method else espalier.prune(net, x[:2], budget=espalier.Budget(weights=28))  # fmt: skip
    assert zeros(small) == 0.75
    assert parameters(small) == parameters(net)
    assert zeros(net) == 0.0


def test_single_weights_step_by_step() -> None:
    torch.manual_seed(0)
    net, shares = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), []
    small = espalier.prune(
        net, torch.rand(2, 4), budget=espalier.Budget(weights=0.25), steps=2, finetune=lambda m: shares.append(zeros(m))
    )
    assert shares == [0.5, 0.75]
    assert zeros(small) == 0.75


def test_structures_by_the_second_order_model() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), torch.rand(300, 4), torch.arange(300) % 3
    small = espalier.prune(
        net, x[:2], budget=espalier.Budget(macs=0.5), method="structured-chita", data=(x, y),
        options=FamilyOptions(n=40, batch=5),
    )  # fmt: skip
    assert small[0].out_features == 8


def test_what_does_not_go_together(model: nn.Module) -> None:
    x = batches()[0]
    with pytest.raises(BudgetError, match=r"Budget\(weights=\.\.\.\) alone"):
        espalier.prune(model, x, budget=espalier.Budget(macs=0.5), method="chita", data=labelled())
    with pytest.raises(BudgetError, match="not Budget"):
        espalier.prune(model, x, budget=espalier.Budget(weights=0.5), method="structured-chita", data=labelled())
    with pytest.raises(TypeError, match="ridge: settings are for a method"):
        espalier.prune(model, x, budget=espalier.Budget(macs=0.5), ridge=1.0)
