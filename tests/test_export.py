"""Files: what is saved comes back, and nothing else gets in."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import Residual, TwoBranches, equal_in_both_modes
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import espalier
from espalier.errors import FormatError
from espalier.models.demonet import DemoNet

X = torch.randn(2, 3, 32, 32)


def small_demonet() -> nn.Module:
    space = espalier.search_space(DemoNet(width=0.25), (X,))
    return espalier.construct(space, space.solution(["conv2-bn2", "conv8-bn8"]))


def test_round_trip_and_training_goes_on(tmp_path: Path) -> None:
    small = small_demonet()
    espalier.save(small, tmp_path / "small.espalier")
    loaded = espalier.load(tmp_path / "small.espalier")
    assert equal_in_both_modes(small, loaded, X)
    assert list(loaded.state_dict()) == list(small.state_dict())
    loaded.train()(X).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["small.espalier"]


def test_own_classes_need_leave(tmp_path: Path) -> None:
    space = espalier.search_space(Residual(), (X,))
    small = espalier.construct(space, space.solution(["blocks.1.conv-bn"]))
    espalier.save(small, tmp_path / "r.espalier")
    with pytest.raises(FormatError, match=r"allow=\('networks',\)"):
        espalier.load(tmp_path / "r.espalier")
    loaded = espalier.load(tmp_path / "r.espalier", allow=("networks",))
    assert type(loaded) is Residual
    assert equal_in_both_modes(small, loaded, X)


def test_shared_and_frozen_parameters_and_buffers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    espalier.save(model, tmp_path / "m.espalier")
    loaded = espalier.load(tmp_path / "m.espalier")
    assert loaded[1].weight is loaded[0].weight
    assert not loaded[2].weight.requires_grad
    assert equal_in_both_modes(model, loaded, torch.randn(5, 4))


def test_loads_in_a_new_process_from_its_file_alone(tmp_path: Path) -> None:
    small = small_demonet().eval()
    espalier.save(small, tmp_path / "small.espalier")
    torch.save(X, tmp_path / "x.pt")
    code = (
        "import sys, torch, espalier\n"
        "m = espalier.load(sys.argv[1] + '/small.espalier').eval()\n"
        "torch.save(m(torch.load(sys.argv[1] + '/x.pt')).detach(), sys.argv[1] + '/y.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), small(X).detach(), rtol=0, atol=0)


def test_truncated_tampered_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "small.espalier"
    espalier.save(small_demonet(), path)
    raw = path.read_bytes()
    for cut in (3, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cut").write_bytes(raw[:cut])
        with pytest.raises(FormatError, match="truncated"):
            espalier.load(tmp_path / "cut")
    flipped = bytearray(raw)
    flipped[-7] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    with pytest.raises(FormatError, match="digest"):
        espalier.load(tmp_path / "flipped")
    with safe_open(path, "pt") as file:
        header, tensors = dict(file.metadata()), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    header["architecture"] = header["architecture"].replace("torch.nn.modules.conv:Conv2d", "os:system")
    save_file(tensors, tmp_path / "evil", metadata=header)
    with pytest.raises(FormatError, match="digest"):
        espalier.load(tmp_path / "evil")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(FormatError, match="no module"):
        espalier.load(tmp_path / "plain")
    torch.save(DemoNet(width=0.25), tmp_path / "pickle")
    with pytest.raises(FormatError):
        espalier.load(tmp_path / "pickle")
    with pytest.raises(FormatError, match="no such file"):
        espalier.load(tmp_path / "nothing")


def test_a_valid_digest_does_not_make_code_run(tmp_path: Path) -> None:
    from espalier.export import _digest

    architecture = json.dumps(
        {
            "training": True,
            "parameters": {},
            "buffers": {},
            "modules": {},
            "transient": [],
            "class": "os:system",
            "attributes": {},
        }
    )
    header = {
        "format": "espalier.module.1",
        "architecture": architecture,
        "digest": _digest(architecture, {}),
    }
    save_file({}, tmp_path / "evil", metadata=header)
    with pytest.raises(FormatError, match="trust"):
        espalier.load(tmp_path / "evil")


def test_what_cannot_be_saved_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(FormatError, match="module '0' has hooks"):
        espalier.save(hooked, tmp_path / "a")
    odd = TwoBranches()
    odd.a.note = object()  # type: ignore[assignment]
    with pytest.raises(FormatError, match="attribute 'note' of module 'a'"):
        espalier.save(odd, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_onnx(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small = small_demonet().train()
    espalier.export_onnx(small, (X,), tmp_path / "small.onnx")
    assert small.training
    session = ort.InferenceSession(tmp_path / "small.onnx")
    more = torch.randn(5, 3, 32, 32)
    (out,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), copy.deepcopy(small).eval()(more).detach(), rtol=1e-4, atol=1e-5)


def test_solutions(tmp_path: Path) -> None:
    space = espalier.search_space(TwoBranches(), (torch.randn(2, 4),))
    masks = {"out.weight": torch.rand(2, 4) > 0.5}
    solution = espalier.Solution(("a",), space.fingerprint, masks, {"method": "test", "budget": {"params": 0.5}})
    solution.save(tmp_path / "s")
    loaded = espalier.Solution.load(tmp_path / "s")
    assert loaded.removed == solution.removed
    assert loaded.provenance == solution.provenance
    assert torch.equal(loaded.masks["out.weight"], masks["out.weight"])
    small = espalier.construct(space, loaded)
    assert not small.get_submodule("out").weight[~masks["out.weight"]].any()
    (tmp_path / "t").write_bytes((tmp_path / "s").read_bytes()[:-3])
    with pytest.raises(FormatError, match="damaged"):
        espalier.Solution.load(tmp_path / "t")


def test_tensors_in_dicts(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
            return {"sum": self.a(batch["x"]) + scale * self.b(batch["y"])}

    batch = {"x": torch.randn(2, 4), "y": torch.randn(2, 4)}
    space = espalier.search_space(Named(), (batch,))
    small = espalier.construct(
        space, space.solution(["b-mul"] if "b-mul" in space.structures.names else [space.structures[-1].name])
    )
    espalier.save(small, tmp_path / "n")
    assert torch.equal(espalier.load(tmp_path / "n")(batch)["sum"], small(batch)["sum"])
