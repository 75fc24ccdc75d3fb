"""Reconstruction over a search space: the pairs that it finds, what it removes, and that nothing else changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_channels import Tokens
from torch import Tensor, nn

import espalier
from espalier.errors import BudgetError, SpaceError
from espalier.select.layerwise import narrow, prune_layers
from espalier.select.reconstruct import FamilyCost, pairs_of, reconstruct


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


@pytest.mark.parametrize("method", ["omp", "backward", "ispasp", "auxiliary"])
def test_the_budget_holds_and_the_network_is_the_masked_one(space: espalier.SearchSpace, method: str) -> None:
    data = batches()
    before = {name: p.clone() for name, p in space.model.named_parameters()}
    refitted, solution = reconstruct(space, data, espalier.Budget(macs=0.7), method=method)
    assert all(torch.equal(p, before[name]) for name, p in space.model.named_parameters())
    assert solution.removed
    small = espalier.construct(refitted, solution)
    assert type(small) is Small
    assert refitted.cost(solution.removed).macs <= 0.7 * space.cost().macs
    for x in data:
        torch.testing.assert_close(refitted.masked(solution)(x), small(x), rtol=1e-9, atol=1e-9)


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


def test_the_cost_of_families_is_the_cost_of_the_network(space: espalier.SearchSpace) -> None:
    chosen = [f for f in space.families if f.name in pairs_of(space)]
    removed = [f.name_of(i) for f in chosen for i in range(f.count // 2)]
    params, _ = FamilyCost(space, chosen)([f.count - f.count // 2 for f in chosen])
    assert params == pytest.approx(space.cost(removed).params)


def test_what_cannot_be_done_is_said(space: espalier.SearchSpace) -> None:
    with pytest.raises(BudgetError, match="nearest is"):
        reconstruct(space, batches(), espalier.Budget(macs=0.01))
    with pytest.raises(BudgetError, match="params or macs"):
        reconstruct(space, batches(), espalier.Budget(structures=0.5))
    segments = espalier.search_space(space.model, space.trace.args)
    with pytest.raises(SpaceError, match="levels"):
        reconstruct(segments, batches(), espalier.Budget(macs=0.5))


RANKS = """
import sys, warnings
import torch, espalier
from torch import nn

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, folder, case = torch.distributed.get_rank(), sys.argv[1], sys.argv[2]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 3)).double()
data = torch.randn(96, 5, dtype=torch.float64).split(16)[rank::2]
if case == "empty" and rank:
    data = []
if case == "nan" and rank:
    data[0][0] = torch.nan
try:
    small = espalier.prune(model, torch.randn(4, 5).double(), data=data, method="omp", budget=espalier.Budget(macs=0.5))
    torch.save(small.state_dict(), f"{folder}/{rank}.pt")
except Exception as error:
    torch.save(f"{type(error).__name__}: {error}", f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def in_two_processes(tmp_path: Path, case: str) -> list:
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(tmp_path / "ranks.py"), str(tmp_path), case],
        env=environment, timeout=120, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_get_the_network_of_one_process(tmp_path: Path) -> None:
    first, second = in_two_processes(tmp_path, "all")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    data = torch.randn(96, 5, dtype=torch.float64).split(16)
    small = espalier.prune(model, data[0], data=data, method="omp", budget=espalier.Budget(macs=0.5))
    assert small[0].out_features < 24
    for name, value in small.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("case", "words"), [("empty", "loader is empty"), ("nan", "holds NaN")])
def test_an_error_on_one_rank_ends_all(tmp_path: Path, case: str, words: str) -> None:
    first, second = in_two_processes(tmp_path, case)
    assert "other processes" in first
    assert words in second
