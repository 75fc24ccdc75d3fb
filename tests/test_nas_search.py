"""The searches: exactness of dropping and discretising, the target, resuming, and the baselines' formulas."""

import copy
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import softmax

import espalier
from espalier.data import Batches, load
from espalier.errors import FormatError, SpaceError
from espalier.models.darts import Cell
from espalier.nas.any_model import search_model
from espalier.nas.baselines import _shares, random_genotype
from espalier.nas.genotype import GENOTYPES, Genotype
from espalier.nas.group_search import GroupSearch, GroupSettings, Limit
from espalier.nas.gs_nas import new_supernet
from espalier.nas.heatmap import heatmap
from espalier.nas.loop import Folder, advance
from espalier.nas.mixed import discretise, mix, strengths, strongest
from espalier.nas.recipe import Images, pooled, search_recipe, train_recipe
from espalier.nas.score import recalibrate, score
from espalier.nas.search import search
from espalier.nas.space import uniform
from espalier.nas.spaces import SPACES, space
from espalier.nas.supernet import (
    alive_groups,
    clip_scalars,
    genotype_of,
    operation_groups,
    scalars_of,
    stays_dead,
    supernet_space,
    take_out,
    zero_out,
)
from espalier.nas.train import train
from espalier.space.budget import Budget

TINY = uniform("tiny", ("skip", "sep_conv_3x3"), nodes=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SPACES, "tiny", TINY)


def digits(split="train"):
    return load("digits", split)


def supernet(within=TINY, **options):
    torch.manual_seed(0)
    return within.supernet(4, 3, in_channels=1, **options)


def group_search(settings=None, steps=12, **options):
    settings = settings or GroupSettings(mu=0.6, lr=0.2, patience=3, drop_every=3, norms_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GroupSearch(supernet(), Batches(digits(), 64), settings, steps, **options)


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


# Dropping.


def test_dropping_dead_operations_changes_no_other_bit():
    dropped, whole = group_search(steps=40), group_search(steps=40)
    whole._remove = lambda gone: zero_out(whole.model, gone)  # at zero, but still running
    while dropped.done < dropped.steps:
        dropped.step()
        whole.step()
    assert len(dropped.removed) > 0
    assert len(list(dropped.model.parameters())) < len(list(whole.model.parameters()))
    kept = whole.model.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in dropped.model.state_dict().items())
    assert dropped.zero() == whole.zero()


def test_only_what_cannot_come_back_is_taken_out():
    model = supernet(space("nas-bench-201"))
    assert stays_dead(model) == set()  # one layer each, or a number: all may come back
    assert stays_dead(supernet()) == {name for name in alive_groups(supernet()) if "sep_conv" in name}
    zero_out(model := supernet(), alive_groups(model))
    x = torch.randn(8, 1, 8, 8)
    nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
    for name, parameter in model.named_parameters():
        if "sep_conv" in name:
            assert float(parameter.grad.abs().max()) == 0.0


def test_the_penalty_ends_at_the_limit_and_what_died_first_goes():
    asked = []

    def fits(dead):
        asked.append(list(dead))
        return dead[:2] if len(dead) >= 2 else None

    search_ = group_search(steps=60, limit=Limit(fits))
    while search_.done < search_.steps:
        search_.step()
    assert search_.removed == asked[-1][:2]
    assert search_.opt.mu == 0.0
    assert 0 < search_.ended_at < 60
    assert len(search_.alive()) == len(search_.names) - 2


# Discretising.


@pytest.mark.parametrize("within", [TINY, uniform("all", ("skip", "avg_pool_3x3", "dil_conv_3x3"), nodes=2)])
def test_the_constructed_discretised_supernet_is_the_supernet_to_the_last_digit(within):
    model = supernet(within)
    found = supernet_space(model, torch.randn(2, 1, 8, 8))
    names = [s.name for s in found.structures]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1)).tolist()
    dead = found.removable_in_order([names[i] for i in order], stop_at=len(names) // 2)
    zero_out(model, dead)
    recalibrate(model, digits(), batches=4)
    small = copy.deepcopy(model)
    take_out(small, dead)
    constructed = espalier.construct(found, found.solution(dead))
    assert sum(p.numel() for p in constructed.parameters()) < sum(p.numel() for p in model.parameters())
    x, _ = digits("test").tensors()
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(small.eval()(x), expected)
        assert torch.equal(constructed.eval()(x), expected)
    scores = [score(m, digits("test")) for m in (model, small, constructed)]
    assert scores[0] == scores[1] == scores[2]


def test_a_supernet_with_a_dead_node_is_discretised_to_the_last_digit():
    model = supernet()
    dead = [name for name in alive_groups(model) if ".0_3." in name or ".1_3." in name or ".2_3." in name]
    zero_out(model, dead)
    recalibrate(model, digits(), batches=4)
    small = copy.deepcopy(model)
    take_out(small, dead)
    x, _ = digits("test").tensors()
    with torch.no_grad():
        assert torch.equal(small.eval()(x), model.eval()(x))
    assert score(small, digits("test")) == score(model, digits("test"))
    found = genotype_of(TINY, alive_groups(small))
    assert list(found.edges("normal")) == ["0_2", "1_2"]


def test_recalibration_takes_plain_means():
    model = nn.Sequential(nn.BatchNorm2d(1))
    data = digits()
    recalibrate(model, data, batches=3, batch_size=50)
    from itertools import islice

    means = [x.mean() for x, _ in islice(Batches(data, 50), 3)]
    torch.testing.assert_close(model[0].running_mean[0], torch.stack(means).mean())
    assert model[0].momentum == 0.1


# Ties.


def test_tied_structures_go_together_for_every_method():
    found = supernet_space(supernet(), torch.randn(2, 1, 8, 8))
    assert {s.name for s in found.structures} == set(alive_groups(supernet()))
    removed = found.sample(Budget(params=0.6), torch.Generator().manual_seed(0)).removed
    model = espalier.construct(found, found.solution(removed))
    own = sum(p.numel() for p in model.parameters())
    assert own <= 0.6 * sum(p.numel() for p in found.model.parameters())
    grouping = operation_groups(found.model)
    by_group = {name: set() for name in grouping.names}
    for parameter, owner in grouping.owner.items():
        by_group[grouping.names[int(owner)]].add(parameter)
    assert {s.name: set(s.parameters) for s in found.structures} == by_group


def test_any_model_is_searched_by_the_same_optimizer(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 16)
            self.left = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.right = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
            self.out = nn.Linear(16, 10)

        def forward(self, x):
            x = torch.relu(self.first(x.flatten(1)))
            for left, right in zip(self.left, self.right, strict=True):
                x = torch.relu(left(x) + right(x) + x)
            return self.out(x)

    torch.manual_seed(0)
    found = espalier.search_space(Net(), (torch.randn(2, 1, 8, 8),))
    settings = GroupSettings(mu=0.3, lr=0.3, normalize="init", patience=3)
    key = lambda name: name.split(".")[0]  # noqa: E731
    solution = search_model(
        found, Batches(digits(), 64), 30, Folder(tmp_path), 0.9, settings, key, trials=6, tolerance=0.9
    )
    assert {name.split(".")[0] for name in solution.removed} <= {"left", "right"}
    assert solution.removed
    for side in ("left", "right"):  # tied: both layers of a side, or none
        assert sum(name.startswith(side) for name in solution.removed) in (0, 2)
    small = espalier.construct(found, solution)
    assert sum(p.numel() for p in small.parameters()) <= 0.9 * sum(p.numel() for p in found.model.parameters())
    x, _ = digits("test").tensors()
    torch.testing.assert_close(small.eval()(x), found.masked(solution).eval()(x))


# Warnings and recipes.


def test_the_published_constants_zero_what_has_no_weights_whatever_the_data():
    recipe = search_recipe("darts", preset="paper")
    assert (recipe.groups.mu, recipe.groups.lr, recipe.groups.rho, recipe.epochs) == (60.0, 1e-3, 0.8, 100.0)
    with pytest.warns(UserWarning, match="bound to be zeroed whatever the data"):
        search_ = GroupSearch(space("s2").supernet(16, 8), Batches(digits(), 64), recipe.groups, 1)
    bound = search_.opt.bound_to_vanish()
    assert set(bound) == {
        n for n in search_.names if n.endswith(".skip") and not n.startswith(("reduce.0_", "reduce.1_"))
    }
    mu = dict(zip(search_.names, search_.opt.mu_per_group().tolist(), strict=True))
    assert round(mu["normal.0_2.skip"], 1) == 24.5
    assert round(mu["normal.0_2.sep_conv_3x3"], 3) == 0.375


def test_the_default_leaves_every_group_its_chance():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_ = GroupSearch(supernet(), Batches(digits(), 64), search_recipe("s2").groups, 1)
    assert search_.opt.bound_to_vanish() == []


def test_unknown_names_are_refused():
    for wrong in ({"method": "evolution"}, {"preset": "best"}, {"scale": "huge"}):
        with pytest.raises(SpaceError, match="is not one of"):
            search_recipe(**wrong)
    with pytest.raises(SpaceError, match="is not one of"):
        train_recipe("huge")


def test_images_are_pooled_and_labels_shuffled():
    whole, small = digits(), pooled(digits(), 2)
    x = np.asarray(whole.images[whole.rows[3]]).astype(np.float64)
    assert np.array_equal(small.images[3], np.rint(x.reshape(4, 2, 4, 2).mean((1, 3))))
    plain, mixed = (Images("digits", train=500, validation=100, shuffled=s).load("train") for s in (False, True))
    a, b = (np.asarray(d.labels)[d.rows] for d in (plain, mixed))
    assert np.array_equal(plain.rows, mixed.rows)
    assert np.array_equal(np.bincount(a), np.bincount(b))
    assert 0.02 < (a == b).mean() < 0.25  # by chance


def test_scalars_stay_between_zero_and_one():
    scalars = scalars_of(supernet())
    assert len(scalars) == 15
    with torch.no_grad():
        scalars[0].fill_(1.5)
        scalars[1].fill_(-0.5)
    clip_scalars(scalars)
    assert [s.item() for s in scalars[:3]] == [1.0, 0.0, 1.0]


# Whole searches, on the digits.


def smoke(method, preset="default", **changes):
    recipe = search_recipe("tiny", method, preset, "smoke", "digits")
    recipe = replace(recipe, target_cells=5, target_channels=8, target_params=0.0, batch_size=64)
    return replace(recipe, **changes)


@pytest.mark.parametrize("method", ["gs-nas", "h2spg", "darts", "pc-darts", "random"])
def test_every_method_finds_a_genotype_and_is_not_run_twice(method, tmp_path):
    recipe = smoke(method, groups=GroupSettings(mu=0.05, lr=0.1, norms_every=2))
    found = search(recipe, Folder(tmp_path))
    assert found.params == found.genotype.params(8, 5)
    assert Genotype.load(tmp_path / "genotype.json") == found.genotype
    assert found.cost["steps"] > 0
    again = search(recipe, Folder(tmp_path))
    assert again.to_json() == found.to_json()
    with pytest.raises(FormatError, match="another seed"):
        search(replace(recipe, seed=5), Folder(tmp_path))
    if method == "gs-nas":
        accuracies = [value for name, value in found.scores.items() if "as trained" not in name]
        assert accuracies[0] == accuracies[1]
        small = espalier.load(tmp_path / "discretised.espalier", allow=("espalier",))
        held_out = recipe.images.load("validation")
        assert score(small, held_out)["accuracy"] == accuracies[1]


def test_bisection_reaches_the_target(tmp_path):
    full = Genotype.of(TINY, {k: TINY.edges(k) for k in TINY.kinds}).params(8, 5)
    groups = GroupSettings(mu=0.3, lr=0.3, patience=3, drop_every=2, norms_every=5)
    recipe = smoke("gs-nas", target_params=0.8 * full, groups=groups, epochs=10.0, later=5.0, tolerance=0.2)
    found = search(recipe, Folder(tmp_path))
    assert 0.6 * full <= found.params <= 0.8 * full
    with pytest.raises(SpaceError, match="everything together has"):
        search(replace(recipe, target_params=2.0 * full), Folder(tmp_path / "other"))


def test_random_genotypes_are_of_the_target_size():
    recipe = smoke("random", target_params=20_000.0)
    sizes = [random_genotype(TINY, recipe, torch.Generator().manual_seed(i)).params(8, 5) for i in range(5)]
    assert all(17_000 < size <= 20_000 for size in sizes)
    two = random_genotype(space("darts"), replace(recipe, top=2), torch.Generator().manual_seed(0))
    assert len(two.operations()) == 16


# Resuming.


class Killed(Exception):
    pass


def killed_after(path, lines):
    seen = []

    def tell(line):
        seen.append(line)
        if len(seen) == lines:
            raise Killed

    return Folder(path, tell, save_every=0.0)


def plain(path):
    return [{k: v for k, v in json.loads(line).items() if k != "step_ms"} for line in path.read_text().splitlines()]


def test_a_killed_group_search_goes_on_bit_for_bit(tmp_path):
    whole = group_search(steps=40)
    advance(whole, Folder(tmp_path / "whole"))
    with pytest.raises(Killed):
        advance(group_search(steps=40), killed_after(tmp_path / "parts", 9))
    with pytest.raises(Killed):
        advance(group_search(steps=40), killed_after(tmp_path / "parts", 7))
    parts = group_search(steps=40)
    advance(parts, Folder(tmp_path / "parts"))
    assert len(whole.removed) > 0
    assert parts.removed == whole.removed
    assert same(parts.model.state_dict(), whole.model.state_dict())
    assert torch.equal(parts.opt.state_dict()["buffers"]["v"], whole.opt.state_dict()["buffers"]["v"])
    assert plain(tmp_path / "parts" / "log.jsonl") == plain(tmp_path / "whole" / "log.jsonl")


def test_h2spg_bounds_the_number_of_operations_with_the_parameters(tmp_path):
    """Operations without weights cost no parameters: a bound on these alone would keep all of them."""
    recipe = replace(search_recipe("s4", "h2spg", scale="smoke", data="digits"), target_params=2e6)
    model = new_supernet(recipe, SPACES["s4"], torch.device("cpu"))
    params, operations = _shares(recipe, SPACES["s4"], model)
    assert 0 < params < 1
    assert 0 < operations < 0.5
    found = search(recipe, Folder(tmp_path))
    assert len(found.genotype.operations()) <= operations * 56


@pytest.mark.parametrize("method", ["h2spg", "darts"])
def test_a_killed_baseline_finds_the_same(method, tmp_path):
    recipe = smoke(method, groups=GroupSettings(norms_every=1), epochs=3.0)
    found = search(recipe, Folder(tmp_path / "whole"))
    with pytest.raises(Killed):
        search(recipe, killed_after(tmp_path / "parts", 3))
    again = search(recipe, Folder(tmp_path / "parts"))
    assert again.genotype == found.genotype
    assert again.scores == found.scores
    assert plain(tmp_path / "parts" / "norms.jsonl") == plain(tmp_path / "whole" / "norms.jsonl")


def test_a_killed_training_ends_with_the_same_network(tmp_path):
    recipe = train_recipe("smoke", "digits", epochs=3.0, drop_path=0.3)
    found = GENOTYPES["darts-v2"]
    result = train(found, recipe, Folder(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(found, recipe, killed_after(tmp_path / "parts", 2))
    again = train(found, recipe, Folder(tmp_path / "parts"))
    assert {k: v for k, v in again.items() if k != "wall_s"} == {k: v for k, v in result.items() if k != "wall_s"}
    networks = [espalier.load(tmp_path / name / "network.espalier") for name in ("whole", "parts")]
    assert same(networks[0].state_dict(), networks[1].state_dict())


def test_a_compiled_search_is_the_same_search(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))  # no C++ compiler is needed
    plain_search, compiled = group_search(steps=4), group_search(steps=4, compiled=True)
    assert compiled.net is not compiled.model
    for _ in range(4):
        plain_search.step()
        compiled.step()
    assert same(compiled.model.state_dict(), plain_search.model.state_dict())


# Weighted edges.


def test_darts_edges_are_the_weighted_sum_of_their_operations():
    torch.manual_seed(0)
    within = uniform("w", ("none", "skip", "max_pool_3x3", "sep_conv_3x3"), nodes=1)
    model = within.supernet(4, 3, scalars=False)
    kinds = mix(model, within)
    model.double()
    kinds.double()
    cell = model.cells[0].eval()
    assert isinstance(cell, Cell)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for edge in ("0_2", "1_2"):
        mixed = cell.edges[edge]["mixed"]
        weights = softmax(kinds["normal"].operations[edge], 0)
        expected = sum(weights[i] * mixed.ops[i](x) for i in (1, 2, 3))  # none, first of all, adds nothing
        torch.testing.assert_close(cell.on_edge(edge, x)[0], expected)
    out = model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    out.sum().backward()
    assert all(p.grad is not None for p in kinds.parameters())


def test_pc_darts_passes_a_quarter_and_shuffles():
    torch.manual_seed(0)
    within = uniform("p", ("skip",), nodes=2)
    model = within.supernet(8, 3, scalars=False)
    kinds = mix(model, within, part=4)
    cell = model.cells[0].eval()
    x = torch.randn(2, 8, 6, 6)
    share = softmax(torch.stack([kinds["normal"].edges[e] for e in ("0_3", "1_3", "2_3")]), 0)[1]
    whole = torch.cat([share * x[:, :2], x[:, 2:]], 1)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    torch.testing.assert_close(cell.on_edge("1_3", x)[0], whole[:, order])


def test_the_strongest_two_edges_of_each_node_stay():
    within = uniform("s", ("none", "skip", "sep_conv_3x3"), nodes=2)
    model = within.supernet(4, 3, scalars=False)
    kinds = mix(model, within)
    with torch.no_grad():
        for kind in kinds:
            for i, edge in enumerate(("0_2", "1_2", "0_3", "1_3", "2_3")):
                kinds[kind].operations[edge].copy_(torch.tensor([9.0 if edge == "0_2" else 0.0, 1.0, 2.0 + i]))
    found = strongest(within, strengths(kinds))
    assert list(found.edges("normal")) == ["0_2", "1_2", "1_3", "2_3"]
    assert set(found.operations()) == {
        (kind, edge, "sep_conv_3x3") for kind in within.kinds for edge in ("0_2", "1_2", "1_3", "2_3")
    }
    discretise(model, found)
    assert list(model.cells[0].edges) == ["0_2", "1_2", "1_3", "2_3"]
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_heat_map_has_a_row_per_group_and_red_for_zero():
    svg = heatmap([{"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0}], [1, 2, 3])
    assert svg.count('text-anchor="end"') == 2
    assert svg.count("var(--es-red)") == 1  # two columns, one box
    assert "from step 2: zero" in svg
