"""The command line, in the process and as a process of its own."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import espalier
from espalier import demo
from espalier.cli import main
from espalier.demo import Demo
from espalier.errors import EspalierError
from espalier.report.console import LiveTraining, space_table
from espalier.report.inspection import load_model, parse_inputs
from espalier.report.results import History, Step

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.a, self.b, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, ids, scale=None):
        x = self.embed(ids)
        x = self.a(x) + self.b(x)
        return self.out(x if scale is None else x * scale)

class Makers:
    small = Net

ready = Net(8)
number = 3
def broken(): raise RuntimeError("no [weights] here")
def text(): return "text"
def needs(width): return Net(width)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "nets_here.py").write_text(NET)
    (tmp_path / "bad_here.py").write_text("import not_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("nets_here", "bad_here"):
        sys.modules.pop(name, None)


def test_inspect_prints_and_draws(here, capsys):
    assert main(["inspect", "nets_here:Net", "--input", "1x5:int64", "--out", "page.html", "--svg"]) == 0
    printed = capsys.readouterr().out
    assert "removable" in printed
    assert "2 of" in printed
    assert "<svg" in (here / "page.html").read_text()
    for kind in ("trace", "segments"):
        ElementTree.fromstring((here / f"page-{kind}.svg").read_text())


def test_inspect_takes_keyword_inputs_and_keep(here, capsys):
    arguments = ["inspect", "nets_here:ready", "--input", "1x5:int64", "--input", "scale=1x1x1"]
    assert main([*arguments, "--keep", "a", "--levels", "segment"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "protected by keep= ('a')" in printed
    assert (here / "espalier.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nets_here"], "package.module:name"),
        (["nowhere_at_all:Net"], "no module 'nowhere_at_all'"),
        (["bad_here:Net"], "needs 'not_to_be_found'"),
        (["nets_here:Ne"], "It has Net"),
        (["nets_here:number"], "is of type int"),
        (["nets_here:text"], "not a torch.nn.Module"),
        (["nets_here:broken"], "no [weights] here"),
        (["nets_here:needs"], "name a function of your own"),
        (["nets_here:Net"], "the model's own forward failed"),
        (["nets_here:Net", "--input", "1xq"], "like 1x3x32x32"),
        (["nets_here:Net", "--input", "1x0"], "like 1x3x32x32"),
        (["nets_here:Net", "--input", "1x5:complex"], "there is no type 'complex'"),
        (["nets_here:Net", "--input", "1x5:int64", "--keep", "z"], "matches no module"),
        (["nets_here:Net", "--input", "1x5:int64", "--levels", "atom"], "atom"),
    ],
)
def test_inspect_says_what_to_mend(here, capsys, arguments, words):
    given = arguments if "--input" in arguments else [*arguments, "--input", "1x5"]
    assert main(["inspect", *given]) == 2
    captured = capsys.readouterr()
    assert words in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert not (here / "espalier.html").exists()


def test_a_dotted_name_is_followed(here):
    assert isinstance(load_model("nets_here:Makers.small"), nn.Module)


def test_inputs_are_parsed():
    args, kwargs = parse_inputs(["2X3x4", "1x7:int", "mask=1x7:bool"])
    assert [tuple(a.shape) for a in args] == [(2, 3, 4), (1, 7)]
    assert [a.dtype for a in args] == [torch.float32, torch.int64]
    assert kwargs["mask"].dtype == torch.bool
    for wrong in ("=3", "1=3", "", "mask="):
        with pytest.raises(EspalierError, match="sizes joined by x"):
            parse_inputs([wrong])


def test_version_help_and_a_wrong_word():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "espalier.cli", *arguments], capture_output=True, text=True)

    version = run("--version")
    assert (version.returncode, version.stdout.strip()) == (0, f"espalier {espalier.__version__}")
    wrong = run("inspekt")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_the_live_display_tells_the_state():
    out = StringIO()
    history = History(structures=4, target=2)
    with LiveTraining(history, 2, Console(file=out, force_terminal=True, width=120)) as live:
        live.update(Step(1, "warmup", 2.0, 0.1, 0))
        live.update(Step(2, "hybrid", 1.25, 0.1, 2, accuracy=0.5))
    for words in ("half-space steps", "step 2/2", "1.2500", "50.0 %", "2/2"):
        assert words in out.getvalue()
    plain = StringIO()
    with LiveTraining(history, 2, Console(file=plain)) as live:
        live.update(Step(1, "warmup", 2.0, 0.1, 0))
        live.update(Step(2, "hybrid", 1.25, 0.1, 2, accuracy=0.5))
    assert plain.getvalue().count("\n") == 1


def test_a_long_space_is_cut_and_says_so():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3)) for _ in range(3)))

    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            found = []
            for part in self.parts:
                x = part(x)
                found.append(x)
            return found

    space = espalier.search_space(Returns(), (torch.randn(2, 3),))
    out = StringIO()
    Console(file=out, width=100).print(space_table(space.summary(), limit=1))
    assert "2 more that stay" in out.getvalue()


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    settings = Demo(out=folder, epochs=2, width=0.125, threads=torch.get_num_threads(), reference=False)
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = StringIO()
    return folder, demo.run(settings, Console(file=out, width=120)), out.getvalue()


def test_the_demo_does_the_main_job(short_demo):
    folder, good, printed = short_demo
    assert good
    assert {p.name for p in folder.iterdir()} >= {
        "report.html",
        "networks.svg",
        "small.espalier",
        "small.onnx",
    }
    for words in ("Search space", "Before and after", "latency, batch of 64", "3/3", "holds", "small.onnx"):
        assert words in printed
    assert "FAILS" not in printed
    page = (folder / "report.html").read_text()
    assert page.count("<figure data-drawing>") == 4
    assert "Saliency per structure" in page
    assert isinstance(espalier.load(folder / "small.espalier"), nn.Module)


def test_the_demo_fails_where_a_check_fails(short_demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run", lambda *_: False)
    monkeypatch.setattr("espalier.cli.run", lambda *_: False)
    assert main(["demo", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "--epochs is above 0"),
        (["--batch-size", "99999"], "smaller batch_size"),
        (["--budget", "1.5"], "between 0 and 1"),
        (["--budget", "0"], "cannot be met"),
    ],
)
def test_the_demo_says_what_to_mend(tmp_path, capsys, arguments, words):
    pytest.importorskip("sklearn")
    assert main(["demo", "--out", str(tmp_path), "--threads", str(torch.get_num_threads()), *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_place_that_cannot_be_written_is_named(here, capsys):
    (here / "file").write_text("")
    arguments = ["inspect", "nets_here:Net", "--input", "1x5:int64"]
    assert main([*arguments, "--out", "file/page.html"]) == 2
    assert "file" in capsys.readouterr().err


def test_an_interrupted_demo_leaves_what_was_written(monkeypatch, tmp_path, capsys):
    report = tmp_path / "report.html"
    report.write_text("the last one")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_train", interrupted)
    pytest.importorskip("sklearn")
    assert main(["demo", "--out", str(tmp_path), "--threads", str(torch.get_num_threads())]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert report.read_text() == "the last one"
    assert [p.name for p in Path(tmp_path).iterdir()] == ["report.html"]


def test_data_prepare_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", "mnist", "--root", str(tmp_path), "--no-download"]) == 2
    assert "espalier data prepare mnist" in capsys.readouterr().err
    assert main(["data", "prepare", "nonsense", "--root", str(tmp_path)]) == 2
