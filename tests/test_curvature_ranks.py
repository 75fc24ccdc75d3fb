"""Gradients shared out over two processes under torchrun: the rows, one file, one solution."""

import subprocess
import sys

import pytest
import torch

from espalier.curvature import GradientOptions, gradients
from espalier.curvature.ranks import rows_of

SCRIPT = """
import sys, torch
from torch import nn
import torch.distributed as dist
from espalier import search_space
from espalier.curvature import GradientOptions, gradients
from espalier.select.multistage import StageOptions
from espalier.select.weights import prune_weights

def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)).double().eval()
    return model, (torch.randn(60, 2, 6, 6).double(), torch.randint(3, (60,)))

def work(folder):
    model, data = case()
    out = {}
    for kind in (torch.float64, torch.bfloat16):
        found = gradients(model, nn.functional.cross_entropy, data, 11, 3, options=GradientOptions(dtype=kind))
        out[f"{kind} first"] = torch.tensor([found.first_row, found.A.shape[0]])
        out[f"{kind}"] = found.gathered().A
        out["loss"] = torch.tensor(found.mean_loss)
        disk = GradientOptions(dtype=kind, path=f"{folder}/A-{kind}.bin")
        mapped = gradients(model, nn.functional.cross_entropy, data, 11, 3, options=disk)
        out[f"{kind} disk"] = mapped.gathered().A.clone()
    options = StageOptions(stages=2, n=10, batch=3, gradient=GradientOptions(dtype=torch.float64))
    space, solution = prune_weights(search_space(model, data[0][:3]), data, keep=0.3, options=options)
    out |= {"mask " + n: m for n, m in solution.masks.items()}
    out |= {"weight " + n: p.detach() for n, p in space.model.named_parameters()}
    return out

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(work(sys.argv[1]), f"{sys.argv[1]}/{dist.get_rank()}.pt")
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks found, and what one process finds."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "shared_out.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(folder / "shared_out.py"), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sys.path.insert(0, str(folder))
    try:
        import shared_out  # type: ignore[import-not-found]

        (folder / "alone").mkdir()
        alone = shared_out.work(folder / "alone")
    finally:
        sys.path.remove(str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)], alone, folder


def test_each_rank_computes_its_rows(ranks):
    (first, second), _, _ = ranks
    for kind in (torch.float64, torch.bfloat16):
        assert first[f"{kind} first"].tolist() == [0, 5]
        assert second[f"{kind} first"].tolist() == [5, 6]
    assert [rows_of(11, r, 2) for r in (0, 1)] == [(0, 5), (5, 11)]


def test_gathered_rows_are_those_of_one_process(ranks):
    (first, second), alone, folder = ranks
    for kind in (torch.float64, torch.bfloat16):
        for name in (f"{kind}", f"{kind} disk"):
            assert first[name].equal(second[name])
            torch.testing.assert_close(first[name], alone[name])
        assert first[f"{kind}"].equal(first[f"{kind} disk"])
        assert not (folder / f"A-{kind}.bin.part").exists()
    torch.testing.assert_close(first["loss"], alone["loss"])


def test_both_ranks_hold_the_solution_of_one_process(ranks):
    (first, second), alone, _ = ranks
    for name, value in alone.items():
        if name.startswith(("mask", "weight")):
            assert first[name].equal(second[name])
            torch.testing.assert_close(first[name], value)


def test_a_failed_run_leaves_no_file(tmp_path):
    model = torch.nn.Linear(2, 2).eval()
    x = torch.tensor([[1.0, 1.0], [torch.nan, 1.0]])
    for options in (GradientOptions(path=tmp_path / "A.bin"), GradientOptions(path=tmp_path / "A.bin", method="loop")):
        with pytest.raises(ValueError, match="mini-batch 1 is not finite"):
            gradients(model, torch.nn.functional.cross_entropy, (x, torch.tensor([0, 1])), 2, options=options)
    assert not list(tmp_path.iterdir())
