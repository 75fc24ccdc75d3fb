"""Spaces of cells and genotypes: exact sizes, wiring, the published tables, and every way to be wrong."""

import json

import pytest
import torch
from torch import nn

from espalier.errors import FormatError, SpaceError
from espalier.models import DARTS, NASBench201
from espalier.models.darts import Cell
from espalier.models.operations import operation
from espalier.nas.draw import draw_genotype, save_drawing
from espalier.nas.genotype import GENOTYPES, Genotype, genotype
from espalier.nas.space import CellSpace, uniform
from espalier.nas.spaces import SPACES, space
from espalier.nas.supernet import operation_groups


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def everything(within: CellSpace) -> dict[str, dict[str, list[str]]]:
    return {k: {e: [n for n in names if n != "none"] for e, names in within.edges(k).items()} for k in within.kinds}


# Sizes.


@pytest.mark.parametrize(
    ("name", "cells", "count"),
    [
        ("darts", 8, 1_930_618 + 336),
        ("s1", 8, 405_270),
        ("s2", 8, 665_578),
        ("s3", 8, 665_578),
        ("s4", 8, 624_618),
        ("nas-bench-201", 5, 1_692_878),
    ],
)
def test_search_networks_have_the_published_sizes(name, cells, count):
    with torch.device("meta"):
        assert params(space(name).supernet(16, cells)) == count


def test_darts_without_scalars_and_models_darts_are_one_network():
    with torch.device("meta"):
        assert params(space("darts").supernet(16, 8, scalars=False)) == params(DARTS()) == 1_930_618
        assert {n for n, _ in space("darts").supernet(16, 8, scalars=False).named_parameters()} == {
            n for n, _ in DARTS().named_parameters()
        }


def test_evaluation_networks_have_the_published_sizes():
    assert GENOTYPES["darts-v2"].params(36, 20) == 3_349_342
    assert GENOTYPES["darts-v1"].params(36, 20) == 3_169_414
    with torch.device("meta"):
        head = GENOTYPES["darts-v2"].network(36, 20, auxiliary=True).auxiliary
    assert isinstance(head, nn.Module)
    assert params(head) == 476_426


def test_groups_of_the_darts_space_are_those_of_the_paper():
    grouping = operation_groups(space("darts").supernet(16, 8))
    size = dict(zip(grouping.names, grouping.size.tolist(), strict=True))
    assert len(size) == 196
    expected = {
        "normal.0_2.skip": 6,
        "normal.0_2.max_pool_3x3": 6,
        "normal.0_2.sep_conv_3x3": 25_536,
        "normal.0_2.sep_conv_5x5": 32_704,
        "normal.0_2.dil_conv_3x3": 12_768,
        "normal.0_2.dil_conv_5x5": 16_352,
        "reduce.0_2.skip": 5_122,
        "reduce.2_3.skip": 2,
        "reduce.0_2.sep_conv_3x3": 11_968,
        "reduce.0_2.sep_conv_5x5": 15_040,
        "reduce.0_2.dil_conv_3x3": 5_984,
        "reduce.0_2.dil_conv_5x5": 7_520,
    }
    assert {name: size[name] for name in expected} == expected


def test_s1_is_the_published_table():
    s1 = space("s1")
    assert s1.edges("normal")["0_2"] == ("skip", "dil_conv_3x3")
    assert s1.edges("normal")["0_4"] == ("max_pool_3x3", "skip")
    assert s1.edges("normal")["4_5"] == ("dil_conv_3x3", "dil_conv_5x5")
    assert s1.edges("reduce")["1_4"] == ("max_pool_3x3", "sep_conv_3x3")
    assert all(len(names) == 2 for kind in s1.kinds for names in s1.edges(kind).values())


# Networks.


def test_auxiliary_head_and_imagenet_form():
    model = GENOTYPES["darts-v2"].network(4, 5, auxiliary=True)
    logits, second = model.train()(torch.randn(2, 3, 32, 32))
    assert logits.shape == second.shape == (2, 10)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    large = GENOTYPES["darts-v2"].network(4, 5, num_classes=12, auxiliary=True, stem="imagenet")
    logits, second = large.train()(torch.randn(2, 3, 224, 224))
    assert logits.shape == second.shape == (2, 12)


def test_drop_path_drops_whole_examples_but_never_a_skip():
    torch.manual_seed(0)
    edges = {"0_2": ("skip",), "1_2": ("max_pool_3x3",)}
    cell = Cell((4, 4), 4, False, False, edges, nodes=1, pool_norm=False)
    cell.train()
    cell.drop_path = 0.5
    x = torch.rand(64, 4, 6, 6) + 1.0
    (skipped,) = cell.on_edge("0_2", x)
    assert torch.equal(skipped, x)
    (pooled,) = cell.on_edge("1_2", x)
    whole = nn.functional.max_pool2d(x, 3, 1, 1)
    dropped = pooled.flatten(1).abs().sum(1) == 0
    assert 10 < int(dropped.sum()) < 54
    torch.testing.assert_close(pooled[~dropped], 2.0 * whole[~dropped])
    cell.eval()
    assert torch.equal(cell.on_edge("1_2", x)[0], whole)


def test_a_node_without_operations_is_left_out_of_the_derived_cell():
    found = Genotype.of(space("s2"), {"normal": {"0_2": ["skip"]}, "reduce": {"1_5": ["sep_conv_3x3"]}})
    model = found.network(4, 3)
    assert [cell.width for cell in model.cells] == [4, 8, 16]
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_operations_several_on_one_edge_are_summed():
    torch.manual_seed(0)
    cell = Cell((4, 4), 4, False, False, {"0_2": ("skip", "sep_conv_3x3")}, nodes=1).double().eval()
    before, last = torch.randn(2, 2, 4, 6, 6, dtype=torch.float64)
    x = cell.preprocess0(before)
    torch.testing.assert_close(cell(before, last), x + cell.edges["0_2"]["sep_conv_3x3"](x))


def test_noise_is_standard_normal_whatever_the_input():
    torch.manual_seed(0)
    out = operation("noise", 4, stride=2)(torch.full((50, 4, 32, 32), 7.0))
    assert out.shape == (50, 4, 16, 16)
    assert abs(float(out.mean())) < 0.02
    assert abs(float(out.std()) - 1.0) < 0.02


def test_nas_bench_201_cell_is_the_sum_along_its_edges():
    torch.manual_seed(0)
    model = NASBench201(4, 1, operations=("nor_conv_3x3", "skip")).double().eval()
    cell, x = model.cells[0], torch.randn(2, 4, 6, 6, dtype=torch.float64)
    nodes = [x]
    for node in (1, 2, 3):
        nodes.append(sum(op(nodes[s]) for s in range(node) for op in cell.edges[f"{s}_{node}"].values()))
    torch.testing.assert_close(cell(x), nodes[-1])


# Genotypes.


@pytest.mark.parametrize("name", list(GENOTYPES))
def test_genotypes_print_parse_and_save(name, tmp_path):
    found = GENOTYPES[name]
    assert Genotype.parse(str(found)) == found
    found.save(tmp_path / "g.json")
    assert Genotype.load(tmp_path / "g.json") == found == genotype(tmp_path / "g.json")
    (tmp_path / "g.txt").write_text(str(found))
    assert genotype(tmp_path / "g.txt") == found
    assert genotype(name.upper().replace("-", "_")) == found


def test_everything_of_every_space_prints_and_parses():
    for within in SPACES.values():
        found = Genotype.of(within, everything(within))
        assert Genotype.parse(str(found)) == found
        assert len(found.operations()) == len(list(within.choices()))


def test_nas_bench_201_strings_parse():
    found = Genotype.parse("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|nor_conv_1x1~0|none~1|avg_pool_3x3~2|")
    assert found.edges("normal") == {
        "0_1": ("nor_conv_3x3",),
        "1_2": ("skip",),
        "0_3": ("nor_conv_1x1",),
        "2_3": ("avg_pool_3x3",),
    }
    assert found.network(4, 1)(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_dead_nodes_are_cleaned():
    cells = {"normal": {"0_2": ["skip"], "3_4": ["skip"], "4_5": ["sep_conv_3x3"]}, "reduce": {"0_2": ["skip"]}}
    assert list(Genotype.of(space("s2"), cells).edges("normal")) == ["0_2"]  # node 3 has no input
    dense = Genotype.of(space("nas-bench-201"), {"normal": {"0_1": ["skip"], "0_2": ["skip"], "2_3": ["skip"]}})
    assert list(dense.edges("normal")) == ["0_2", "2_3"]  # node 1 leads nowhere


def test_a_new_space_is_a_few_lines_and_searchable(monkeypatch):
    edges = {"0_2": ("skip", "sep_conv_5x5"), "1_2": ("max_pool_3x3",), "2_3": ("dil_conv_3x3", "noise")}
    mine = CellSpace("mine", {"normal": edges, "reduce": edges}, nodes=2)
    model = mine.supernet(4, 3, num_classes=5)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    assert len(operation_groups(model)) == 10
    monkeypatch.setitem(SPACES, "mine", mine)
    found = Genotype.of(mine, everything(mine))
    assert Genotype.parse(str(found)) == found


S2 = {"normal": {"0_2": ["skip"]}, "reduce": {"0_2": ["skip"]}}


@pytest.mark.parametrize(
    ("normal", "message"),
    [
        ({"0_2": []}, "normal cell, edge 0_2 is empty"),
        ({}, "no path from an input to its output"),
        ({"3_4": ["skip"]}, "no path from an input to its output"),
        ({"0_2": ["conv_9x9"]}, "unknown operation 'conv_9x9'"),
        ({"0_2": ["noise"]}, "'noise' is not there; the space has skip, sep_conv_3x3"),
        ({"0_9": ["skip"]}, "the space has no such edge"),
        ({"0_2": ["skip", "skip"]}, "names an operation twice"),
    ],
)
def test_wrong_cells_are_refused(normal, message):
    with pytest.raises(SpaceError, match=message):
        Genotype.of(space("s2"), {**S2, "normal": normal})


def test_wrong_genotypes_are_refused(tmp_path):
    with pytest.raises(SpaceError, match="belongs to the space 'darts', not 's2'"):
        Genotype.parse(str(GENOTYPES["darts-v2"]), space("s2"))
    with pytest.raises(SpaceError, match="belongs to the space 'darts', not 's4'"):
        Genotype.from_json(GENOTYPES["darts-v2"].to_json(), space("s4"))
    with pytest.raises(SpaceError, match="cells, not"):
        Genotype.of(space("s2"), {"normal": {"0_2": ["skip"]}})
    with pytest.raises(FormatError, match="no line of a genotype"):
        Genotype.parse("space s2\nnormal 2: skip")
    with pytest.raises(FormatError, match="first line"):
        Genotype.parse("anything")
    with pytest.raises(FormatError, match="is missing"):
        Genotype.parse("Genotype(normal=[('skip_connect', 0)])")
    (tmp_path / "g.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(FormatError, match="its format is 'other'"):
        Genotype.load(tmp_path / "g.json")
    (tmp_path / "g.json").write_text('{"format"')
    with pytest.raises(FormatError, match="damaged"):
        Genotype.load(tmp_path / "g.json")
    with pytest.raises(FormatError, match="neither a file nor a genotype's name"):
        genotype("darts-v9")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"normal": {"0_2": ()}, "reduce": {}}, "edge 0_2 is empty"),
        ({"normal": {"2_2": ("skip",)}, "reduce": {}}, "there is no such edge"),
        ({"normal": {"0_2": ("swish",)}, "reduce": {}}, "unknown operation 'swish'"),
        ({"normal": {}}, "it needs"),
    ],
)
def test_wrong_spaces_are_refused(cells, message):
    with pytest.raises(SpaceError, match=message):
        CellSpace("mine", cells)
    with pytest.raises(SpaceError, match="no stacking"):
        uniform("mine", ("skip",), stacking="tower")
    with pytest.raises(SpaceError, match="no space is called"):
        space("s9")


def test_drawings_hold_every_operation(tmp_path):
    svg = draw_genotype(GENOTYPES["darts-v2"])
    assert svg.count("sep conv 3x3</text>") == 5
    assert svg.count("max pool 3x3</text>") == 5
    save_drawing(GENOTYPES["darts-v1"], tmp_path / "v1.svg")
    assert (tmp_path / "v1.svg").read_text().startswith("<svg")
    with pytest.raises(FormatError, match=r"\.svg or \.png"):
        save_drawing(GENOTYPES["darts-v1"], tmp_path / "v1.gif")
