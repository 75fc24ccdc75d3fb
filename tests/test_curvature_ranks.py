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


FAILING = """
import sys, torch
from torch import nn
import torch.distributed as dist
from espalier.curvature import GradientOptions, gradients

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Linear(4, 3).eval()
x, y = torch.randn(60, 4), torch.randint(3, (60,))
said = []

def attempt(bad, n, path=None):
    data = x.clone()
    if bad is not None:
        data[bad] = torch.nan
    try:
        options = GradientOptions(path=path)
        said.append("no error" if gradients(model, nn.functional.cross_entropy, (data, y), n, options=options) else "")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")

for path in (None, f"{sys.argv[1]}/A.bin"):
    attempt(3, 40, path)  # in the first rank's rows
    attempt(30, 40, path)  # in the second's
attempt(None, 61)  # only the second finds the data too short
few = gradients(model, nn.functional.cross_entropy, (x, y), 1, 5, options=GradientOptions(progress=True))
torch.save((said, few.A.shape[0], few.gathered().A, few.mean_loss), f"{sys.argv[1]}/failing-{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def test_all_ranks_raise_what_one_of_them_finds(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "failing.py", "."], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, none, whole, loss), (second, one, same, again) = (
        torch.load(tmp_path / f"failing-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for own, other, row in ((first, second, 3), (second, first, 30)):
        text = f"the gradient of mini-batch {row} is not finite: the loss overflows on it"
        at = [0, 2] if row == 3 else [1, 3]
        assert [own[i] for i in at] == [f"ValueError: {text}"] * 2
        assert [other[i] for i in at] == [f"ValueError: process {int(row == 30)} of 2: {text}"] * 2
    assert "process 1 of 2: the data ended 1 samples too early" in first[4]
    assert "ValueError: the data ended 1 samples too early" in second[4]
    assert not list(tmp_path.glob("A.bin*"))
    assert (none, one) == (0, 1)  # fewer rows than ranks
    assert whole.shape == (1, 12)
    assert whole.equal(same)
    assert loss == again
    assert done.stderr.count("1 rows × 12 weights") == 1  # the cost, by the first rank only


def test_a_failed_run_leaves_no_file(tmp_path):
    model = torch.nn.Linear(2, 2).eval()
    x = torch.tensor([[1.0, 1.0], [torch.nan, 1.0]])
    for options in (GradientOptions(path=tmp_path / "A.bin"), GradientOptions(path=tmp_path / "A.bin", method="loop")):
        with pytest.raises(ValueError, match="mini-batch 1 is not finite"):
            gradients(model, torch.nn.functional.cross_entropy, (x, torch.tensor([0, 1])), 2, options=options)
    assert not list(tmp_path.iterdir())
