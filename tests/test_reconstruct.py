"""Reconstruction over a search space: the pairs that it finds, what it removes, and that nothing else changes."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_channels import Tokens
from torch import Tensor, nn

import espalier
from espalier.curvature.moments import collect
from espalier.data._torchvision import import_torchvision
from espalier.errors import BudgetError, SpaceError
from espalier.experiments.ispasp_resnet import inner_pairs
from espalier.models.resnet_cifar import resnet20
from espalier.select.gfs import gfs
from espalier.select.layerwise import SELECTORS, narrow, prune_layers
from espalier.select.reconstruct import pairs_of, reconstruct


class Small(nn.Module):
    """A residual convolution block, a transformer block with a gated MLP, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(6, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.outer = nn.Conv2d(16, 6, 3, padding=1)
        self.tokens = Tokens(6, "grouped", "rms")
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(self.inner(x))
        return self.head(self.tokens(x).mean((2, 3)))


@pytest.fixture
def space() -> espalier.SearchSpace:
    torch.manual_seed(0)
    return espalier.search_space(Small().double().eval(), torch.randn(2, 3, 4, 4).double(), levels=("channel", "head"))


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, 3, 4, 4, dtype=torch.float64) for _ in range(4)]


def test_the_pairs(space: espalier.SearchSpace) -> None:
    found = {name: (p.producers, p.via, p.consumers, p.units) for name, p in pairs_of(space).items()}
    assert found == {  # the residual stream has many readers: it stays
        "inner.0": (("inner.0",), ("inner.1",), ("outer",), 16),
        "tokens.gate": (("tokens.gate", "tokens.up"), (), ("tokens.down",), 6),
    }


@pytest.mark.parametrize("method", SELECTORS)
def test_the_budget_holds_and_the_network_is_the_masked_one(
    space: espalier.SearchSpace, method: str, tmp_path: Path
) -> None:
    data = batches()
    before = {name: p.clone() for name, p in space.model.named_parameters()}
    refitted, solution = reconstruct(space, data, espalier.Budget(macs=0.7), method=method)
    assert all(torch.equal(p, before[name]) for name, p in space.model.named_parameters())
    assert solution.removed
    small = espalier.construct(refitted, solution)
    assert type(small) is Small
    assert refitted.cost(solution.removed).macs <= 0.7 * space.cost().macs
    solution.save(tmp_path / "solution")
    again = espalier.Solution.load(tmp_path / "solution")
    assert again.removed == solution.removed
    assert again.provenance["method"] == method
    for x in data:
        torch.testing.assert_close(refitted.masked(solution)(x), small(x), rtol=1e-9, atol=1e-9)


def test_other_bounds_and_ratios(space: espalier.SearchSpace) -> None:
    _, solution = reconstruct(space, batches(), espalier.Budget(structures=0.6))
    assert len(space) - len(solution.removed) == int(0.6 * len(space))
    _, solution = reconstruct(space, batches(), ratios=0.5)
    assert {name: sum(name in s for s in solution.removed) for name in pairs_of(space)} == {
        "inner.0": 8,
        "tokens.gate": 3,
    }
    _, solution = reconstruct(space, batches(), ratios={"inner.0": 0.25}, method=gfs)
    assert len(solution.removed) == 12
    assert solution.provenance["method"] == "gfs"


def test_it_equals_the_layerwise_engine_on_one_pair() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 3)).double()
    data = [torch.randn(64, 5, dtype=torch.float64)]
    space = espalier.search_space(model, data[0], levels=("channel",))
    refitted, solution = reconstruct(space, data, espalier.Budget(params=0.5))
    pair = pairs_of(space)["0"]
    by_hand = narrow(model, prune_layers(model, [pair], data, sizes=[24 - len(solution.removed)]))
    torch.testing.assert_close(espalier.construct(refitted, solution)(data[0]), by_hand(data[0]))


def test_refitting_beats_dropping(space: espalier.SearchSpace) -> None:
    data = batches()
    refitted, solution = reconstruct(space, data, espalier.Budget(macs=0.8))
    x = torch.cat(data)
    with torch.no_grad():
        wanted = space.model(x)
        ours = (espalier.construct(refitted, solution)(x) - wanted).square().mean()
        dropped = (espalier.construct(space, space.solution(solution.removed))(x) - wanted).square().mean()
    assert ours < dropped


def test_every_kind_of_bound_holds_and_widths_are_rounded(space: espalier.SearchSpace) -> None:
    full = space.cost()
    for budget in (
        espalier.Budget(params=0.8),
        espalier.Budget(params=f"{0.8 * full.params}", macs=0.9),
        espalier.Budget(macs=0.8, round_to=4, min_keep={"inner.0": 0.5}),
        espalier.Budget(latency="1s"),
    ):
        _, solution = reconstruct(space, batches(), budget)
        cost = space.cost(solution.removed)
        assert budget.met_by({**vars(cost), "latency": 0.0}, {**vars(full), "latency": 0.0})
        kept = 16 - sum(name.startswith("inner.0") for name in solution.removed)
        assert budget.round_to == 1 or (kept % 4 == 0 and kept >= 8)
    with pytest.raises(BudgetError, match="single weights"):
        reconstruct(space, batches(), espalier.Budget(weights=0.5))


def test_what_cannot_be_done_is_said(space: espalier.SearchSpace) -> None:
    with pytest.raises(BudgetError, match="nearest is"):
        reconstruct(space, batches(), espalier.Budget(macs=0.01))
    with pytest.raises(BudgetError, match="one of the two"):
        reconstruct(space, batches())
    with pytest.raises(BudgetError, match=r"ratio 1\.5 for 'inner.0'"):
        reconstruct(space, batches(), ratios={"inner.0": 1.5})
    with pytest.raises(BudgetError, match="for 'stem'"):
        reconstruct(space, batches(), ratios={"stem": 0.5})
    with pytest.raises(SpaceError, match="no method"):
        reconstruct(space, batches(), espalier.Budget(macs=0.8), method="best")
    segments = espalier.search_space(space.model, space.trace.args)
    with pytest.raises(SpaceError, match="levels"):
        reconstruct(segments, batches(), espalier.Budget(macs=0.5))


RANKS = """
import sys
import torch, espalier
from torch import nn

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, folder = torch.distributed.get_rank(), sys.argv[1]
for case in ("all", "empty", "nan"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    data = torch.randn(96, 5, dtype=torch.float64).split(16)[rank::2]
    if rank and case == "empty":
        data = []
    if rank and case == "nan":
        data[0][0] = torch.nan
    try:
        budget = espalier.Budget(macs=0.5)
        found = espalier.prune(model, torch.zeros(4, 5).double(), data=data, method="omp", budget=budget).state_dict()
    except Exception as error:
        found = str(error)
    torch.save(found, f"{folder}/{case}{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_ranks_get_the_network_of_one_process_and_fail_together(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(tmp_path / "ranks.py"), str(tmp_path)],
        env=environment, timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    data = torch.randn(96, 5, dtype=torch.float64).split(16)
    small = espalier.prune(model, data[0], data=data, method="omp", budget=espalier.Budget(macs=0.5))
    first, second = (torch.load(tmp_path / f"all{rank}.pt") for rank in range(2))
    assert small[0].out_features < 24
    for name, value in small.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-8, atol=1e-9)
    for case, words in (("empty", "loader is empty"), ("nan", "holds NaN")):
        assert words in torch.load(tmp_path / f"{case}1.pt")  # the process that failed; the other says so
        assert torch.load(tmp_path / f"{case}0.pt") == f"process 1 of 2: {torch.load(tmp_path / f'{case}1.pt')}"


def test_the_pairs_of_a_residual_network_with_batch_norms() -> None:
    space = espalier.search_space(resnet20().eval(), torch.randn(2, 3, 32, 32), levels=("channel",))
    assert {replace(p, units=None) for p in pairs_of(space).values()} == set(inner_pairs())


class Twins(nn.Module):
    """A hidden layer with two readers of the same tensor, or of two different ones."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.hidden, self.one, self.two = nn.Linear(5, 16), nn.Linear(16, 3), nn.Linear(16, 4)
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x).relu()
        return torch.cat([self.one(x), self.two(x if self.same else x * x)], 1)


def test_several_readers_of_one_tensor_are_refitted_together() -> None:
    torch.manual_seed(0)
    model = Twins(same=True).double()
    data = [torch.randn(64, 5, dtype=torch.float64)]
    space = espalier.search_space(model, data[0], levels=("channel",))
    assert pairs_of(space)["hidden"].consumers == ("one", "two")
    refitted, solution = reconstruct(space, data, espalier.Budget(macs=0.7))
    torch.testing.assert_close(espalier.construct(refitted, solution)(data[0]), refitted.masked(solution)(data[0]))
    hidden = model.hidden(data[0]).relu()
    support = [i for i in range(16) if f"hidden[{i}]" not in solution.removed]
    rows = torch.cat([hidden[:, support], torch.ones(64, 1)], 1)
    best = rows @ torch.linalg.lstsq(rows, model(data[0])).solution
    torch.testing.assert_close(espalier.construct(refitted, solution)(data[0]), best, rtol=1e-4, atol=1e-5)


def test_readers_of_different_tensors_stay_and_are_named() -> None:
    data = [torch.randn(64, 5)]
    with pytest.raises(SpaceError, match="the same tensor"):
        espalier.prune(Twins(same=False), data[0], data=data, method="omp", budget=espalier.Budget(macs=0.7))
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 5), Twins(same=False))
    _, solution = reconstruct(
        espalier.search_space(model, data[0], levels=("channel",)), data, espalier.Budget(macs=0.8)
    )
    assert "3.hidden" in solution.provenance["stays"]
    assert not any(name.startswith("3.hidden") for name in solution.removed)


# ---------------------------------------------------------------- bad calibration data, through the whole call


def mlp(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3)).double()


def pruned(model: nn.Module, data: list[Tensor], method: str = "omp", macs: float = 0.5) -> nn.Module:
    budget = espalier.Budget(macs=macs)
    return espalier.prune(model, torch.zeros(2, 5).double(), data=data, method=method, budget=budget)


@pytest.mark.parametrize("method", SELECTORS)
def test_fewer_samples_than_neurons_warn_and_work(method: str) -> None:
    with pytest.warns(RuntimeWarning, match="2: 7 samples for 24 columns"):
        small = pruned(mlp(), [torch.randn(7, 5).double()], method)
    assert 1 <= small[0].out_features <= 12
    assert bool(torch.isfinite(small(torch.randn(9, 5).double())).all())


@pytest.mark.parametrize("method", SELECTORS)
def test_dead_and_doubled_neurons_go_first(method: str) -> None:
    model, data = mlp(), [torch.randn(200, 5).double()]
    with torch.no_grad():
        model[0].weight[4:8], model[0].bias[4:8] = 0.0, -1.0
        model[0].weight[12:], model[0].bias[12:] = model[0].weight[:12].clone(), model[0].bias[:12].clone()
    small = pruned(model, data, method)
    with torch.no_grad():
        error = (small(data[0]) - model(data[0])).square().mean() / model(data[0]).var()
    if method in ("omp", "backward"):
        assert float(error) < 1e-8  # eight neurons differ, and twelve may stay
    assert bool(torch.isfinite(error))


def test_data_that_cannot_be_used_is_refused_with_the_layer() -> None:
    bad = torch.randn(9, 5).double()
    bad[3, 0] = torch.nan
    with pytest.raises(ValueError, match="input of 2 holds NaN"):
        pruned(mlp(), [torch.randn(9, 5).double(), bad])
    with pytest.raises(ValueError, match="loader is empty"):
        pruned(mlp(), [])
    model = mlp()
    nn.init.constant_(model[0].bias, -1e3)
    with pytest.raises(ValueError, match="the input of 2 is constant"):
        pruned(model, [torch.randn(200, 5).double()])


@pytest.mark.parametrize("macs", [0.0, 0.01])
def test_no_layer_keeps_less_than_one_unit(macs: float) -> None:
    with pytest.raises(BudgetError, match="nearest"):
        pruned(mlp(), [torch.randn(99, 5).double()], macs=macs)


def test_everything_may_stay() -> None:
    model, data = mlp(), [torch.randn(99, 5).double()]
    torch.testing.assert_close(pruned(model, data, macs=1.0)(data[0]), model(data[0]))


# ---------------------------------------------------------------- heads


def hugging_face() -> Any:
    import_torchvision()  # transformers imports it, and it needs its operators declared before
    return importlib.import_module("transformers")


def llama() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    transformers = hugging_face()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, use_cache=False)
    return transformers.LlamaForCausalLM(config), [{"input_ids": torch.randint(60, (8, 12))} for _ in range(4)]


def vision() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    transformers = hugging_face()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_attention_heads=4))
    return model, [{"pixel_values": torch.randn(8, 3, 16, 16).double()} for _ in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, vision])
def test_heads_and_gated_neurons_of_transformers(make: Callable) -> None:
    torch.manual_seed(0)
    model, data = make()
    model = model.double().eval()
    space = espalier.search_space(model, (), data[0], levels=("channel", "head"))
    pairs = pairs_of(space)
    assert sum(name.endswith("heads") for name in pairs) == 2  # with grouped queries: one key/value group each
    assert len(pairs) == 4
    with torch.enable_grad():
        refitted, solution = reconstruct(space, data, espalier.Budget(params=0.75))
    assert {name.rpartition("[")[0] for name in solution.removed} == set(pairs)
    small, masked = espalier.construct(refitted, solution), refitted.masked(solution)
    assert type(small) is type(model)
    dropped = espalier.construct(space, space.solution(solution.removed))
    errors = {}
    for pair in pairs.values():  # the second moment of concatenated heads, of gate times up
        rows: list[Tensor] = []
        hook = model.get_submodule(pair.consumers[0]).register_forward_pre_hook(
            lambda module, args, rows=rows: rows.append(args[0].flatten(0, -2))
        )
        for batch in data:
            model(**batch)
        hook.remove()
        every = torch.cat(rows)
        found = collect(model, pair.consumers, data)[pair.consumers[0]]
        torch.testing.assert_close(found.gram, every.T @ every, rtol=0, atol=1e-10 * float(found.gram.abs().max()))
        assert pair.block(model) == every.shape[1] // pair.count(model)
    for batch in data:
        torch.testing.assert_close(small(**batch).logits, masked(**batch).logits, rtol=1e-9, atol=1e-9)
        for name, other in (("refitted", small), ("dropped", dropped)):
            gap = (other(**batch).logits - model(**batch).logits).square().mean()
            errors[name] = errors.get(name, 0.0) + float(gap)
    assert errors["refitted"] < errors["dropped"]
