"""Algorithm 2 on networks worked out by hand: segments, structures, validity, budgets, and what is said of the rest."""

import pytest
import torch
from networks import Nested, OnePlus, Product, SharedTwice, SqueezeExcite, TwoBranches, Wide
from torch import nn

import espalier
from espalier.errors import BudgetError, InvalidSolution, SpaceError, TraceError
from espalier.models.demonet import DemoNet
from espalier.space.chains import estimate

IMAGE = (torch.randn(2, 3, 32, 32),)
VECTOR = (torch.randn(3, 4),)


def names(space: espalier.SearchSpace) -> list[str]:
    return [s.name for s in space.structures]


def test_demonet_is_segmented_as_in_figure_2() -> None:
    space = espalier.search_space(DemoNet(width=0.25), IMAGE)
    assert sorted(s.name for s in space.graph) == sorted(
        [
            "conv1-bn1", "conv2-bn2", "maxpool-conv3-bn3", "avgpool-conv4-bn4-conv5-bn5", "cat", "conv6-bn6",
            "conv7-bn7", "conv8-bn8", "add", "linear",
        ]
    )  # fmt: skip
    assert names(space) == [
        "conv2-bn2", "maxpool-conv3-bn3", "avgpool-conv4-bn4-conv5-bn5", "conv7-bn7", "conv8-bn8",
    ]  # fmt: skip
    edges = {(s.name, space.graph[i].name) for s in space.graph for i in s.outgoing}
    assert ("conv1-bn1", "conv2-bn2") in edges
    assert ("conv2-bn2", "cat") in edges
    assert ("conv6-bn6", "conv8-bn8") in edges


def test_every_parameter_and_segment_is_accounted_for() -> None:
    space = espalier.search_space(DemoNet(width=0.25), IMAGE)
    listed = {p for s in space.graph for p in s.parameters}
    assert listed == {name for name, _ in space.model.named_parameters()}
    in_space = {space.graph[i].name for s in space.structures for i in s.segments}
    assert in_space | set(space.kept) == {s.name for s in space.graph}
    summary = space.summary()
    assert sum(r.params for r in summary.rows) == sum(p.numel() for p in space.model.parameters())
    assert sum(r.macs for r in summary.rows) == space.cost().macs
    for name, reason in space.kept.items():
        assert f"no: {reason}" in str(summary)
        assert name in str(summary)


def test_figure_3_removing_both_last_branches_is_invalid() -> None:
    space = espalier.search_space(DemoNet(width=0.25), IMAGE)
    assert space.is_valid(["conv2-bn2", "maxpool-conv3-bn3", "conv8-bn8"])
    reason = space.explain(["conv7-bn7", "conv8-bn8"])
    assert "'add' keeps no input" in reason
    assert "conv7-bn7" in reason
    assert not space.is_valid(["conv7-bn7", "conv8-bn8"])
    with pytest.raises(InvalidSolution, match="keeps no input"):
        space.solution(["conv7-bn7", "conv8-bn8"])


def test_gate_may_go_and_a_factor_may_not() -> None:
    gated = espalier.search_space(SqueezeExcite(), (torch.randn(2, 3, 8, 8),))
    assert len(gated) == 1
    assert gated.is_valid(names(gated))
    assert gated.constant(gated.structures[0].segments[0]).evaluated.item() == 0.5
    product = espalier.search_space(Product(), VECTOR)
    assert "vanishes" in product.explain(["a"])
    assert "vanishes" in product.explain(["b"])
    one_plus = espalier.search_space(OnePlus(), VECTOR)
    assert one_plus.is_valid(names(one_plus))


def test_what_is_dead_needs_no_input() -> None:
    space = espalier.search_space(Nested(), VECTOR)
    assert names(space) == ["a", "b", "c"]
    assert not space.is_valid(["a", "b"])
    assert space.is_valid(["a", "b", "c"])
    assert espalier.construct(space, space.solution(["c"])).state_dict() == {}


def test_shared_layers_go_together() -> None:
    space = espalier.search_space(SharedTwice(), VECTOR)
    shared = next(s for s in space.structures if "shared.weight" in s.parameters)
    assert len(shared.segments) == 2
    assert space.is_valid([shared.name])


def test_tied_to_something_that_stays() -> None:
    class Tied(TwoBranches):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(super().forward(x).repeat(1, 2))

    space = espalier.search_space(Tied(), VECTOR)
    assert names(space) == ["a"]
    assert "shares parameters" in space.kept["b"]


def test_a_parameter_that_does_not_silence_its_segment() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prelu, self.lin = nn.PReLU(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.prelu(x) + self.lin(x)

    space = espalier.search_space(Slope(), VECTOR)
    assert names(space) == ["lin"]
    assert "still depends on its input" in space.kept["prelu"]


def test_keep_by_name_type_and_predicate() -> None:
    model = DemoNet(width=0.25)
    assert "conv2-bn2" not in names(espalier.search_space(model, IMAGE, keep=("conv2",)))
    assert names(espalier.search_space(model, IMAGE, keep=(nn.Conv2d,))) == []
    space = espalier.search_space(model, IMAGE, keep=(lambda path, module: path.endswith("8"),))
    assert "conv8-bn8" not in names(space)
    assert "keep=" in space.kept["conv8-bn8"]
    with pytest.raises(SpaceError, match="matches no module"):
        espalier.search_space(model, IMAGE, keep=("conv99",))
    assert "conv2-bn2" not in names(espalier.search_space(model, IMAGE, levels="segment", keep="conv2"))
    with pytest.raises(SpaceError, match="unknown level"):
        espalier.search_space(model, IMAGE, levels=("sgement",))


def test_frozen_and_half_frozen_models() -> None:
    model = TwoBranches()
    model.a.requires_grad_(False)
    space = espalier.search_space(model, VECTOR)
    assert names(space) == ["b"]
    assert "frozen" in space.kept["a"]
    model.requires_grad_(False)
    frozen = espalier.search_space(model, VECTOR)
    assert len(frozen) == 0
    with pytest.raises(SpaceError, match=r"empty.*frozen"):
        espalier.H2SPG(frozen, lr=0.1)


def test_batch_of_one_as_example() -> None:
    space = espalier.search_space(TwoBranches(), (torch.randn(1, 4),))
    small = espalier.construct(space, space.solution(["a"]))
    assert small(torch.randn(5, 4)).shape == (5, 2)
    assert small(torch.randn(1, 4)).shape == (1, 2)


@pytest.mark.parametrize("bound", ["structures", "params", "macs"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_samples_meet_the_budget_within_one_structure(bound: str, share: float) -> None:
    space = espalier.search_space(Wide(), (torch.randn(2, 6),))
    full = space.cost()
    for i in range(4):
        removed = space.sample(espalier.Budget(**{bound: share}), torch.Generator().manual_seed(i)).removed

        def stays(gone: tuple[str, ...]) -> float:
            if bound == "structures":
                return 1 - len(gone) / len(space)
            return getattr(space.cost(gone), bound) / getattr(full, bound)

        assert stays(removed) <= share + 1e-12
        assert stays(removed[:-1]) > share


@pytest.mark.parametrize("bound", ["structures", "params", "macs"])
def test_the_estimate_is_near_what_random_removals_take(bound: str) -> None:
    space = espalier.search_space(Wide(), (torch.randn(2, 6),))
    budget = espalier.Budget(**{bound: 0.6})
    taken = [len(space.sample(budget, torch.Generator().manual_seed(i)).removed) for i in range(20)]
    guess = estimate(space, budget, trials=20, generator=torch.Generator().manual_seed(99))
    assert abs(guess - sum(taken) / len(taken)) <= 1.0


def test_same_generator_same_sample() -> None:
    space = espalier.search_space(Wide(), (torch.randn(2, 6),))
    one, two = (space.sample(espalier.Budget(params=0.5), torch.Generator().manual_seed(7)) for _ in range(2))
    assert one == two


def test_budget_that_cannot_be_met_names_the_nearest() -> None:
    space = espalier.search_space(TwoBranches(), VECTOR)
    with pytest.raises(BudgetError, match=r"1 can go together.*nearest is structures=0\.500, params=0\.600"):
        space.sample(espalier.Budget(structures=0.0))
    with pytest.raises(BudgetError, match="nearest"):
        space.sample(espalier.Budget(params=0.1))
    with pytest.raises(BudgetError, match="empty budget"):
        espalier.Budget()
    with pytest.raises(BudgetError, match="between 0 and 1"):
        espalier.Budget(params=-0.5)


def test_a_solution_of_another_model_is_refused() -> None:
    space = espalier.search_space(TwoBranches(), VECTOR)
    other = espalier.search_space(TwoBranches(5), (torch.randn(3, 5),))
    solution = other.solution(["a"])
    for use in (espalier.construct, lambda s, sol: s.masked(sol)):
        with pytest.raises(InvalidSolution, match="another model"):
            use(space, solution)
    with pytest.raises(SpaceError, match="no structure is called 'nose'"):
        space.solution(["nose"])


def test_macs_agree_with_the_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = DemoNet(width=0.5).eval()
    space = espalier.search_space(model, IMAGE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*IMAGE)
    assert space.cost().macs == counter.get_total_flops() // 2 // 2
    full = espalier.search_space(DemoNet(), IMAGE).cost()
    assert (full.params, round(2 * full.macs / 1e6, 2)) == (818_442, 209.98)


def test_no_parameters_is_said() -> None:
    with pytest.raises(TraceError, match="no parameters"):
        espalier.search_space(nn.ReLU(), VECTOR)
