"""Compressed rows: export, types without a kernel, bad arguments."""

import pytest
import torch
from torch import nn

from espalier import export_onnx
from espalier.select.sparse import SparseLinear, sparse_layout


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    for layer in (model[0], model[2]):
        keep = layer.weight.abs() > layer.weight.abs().quantile(0.8)
        keep[1] = False  # an empty row
        layer.weight.data *= keep
    return model, torch.randn(5, 12)


def test_export_makes_the_dense_weight(pruned, tmp_path):
    model, x = pruned
    sparse = sparse_layout(model, x, "always")
    assert isinstance(sparse[0], SparseLinear)
    assert sparse[0].dense().equal(model[0].weight)
    torch.testing.assert_close(torch.export.export(sparse, (x,), strict=False).module()(x), model(x))
    runtime = pytest.importorskip("onnxruntime")
    export_onnx(sparse, x, tmp_path / "sparse.onnx")
    run = runtime.InferenceSession(tmp_path / "sparse.onnx")
    out = run.run(None, {run.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_type_without_sparse_product_stays_dense(pruned):
    model, x = pruned[0].bfloat16(), pruned[1].bfloat16()
    kept = sparse_layout(model, x)
    assert all(type(kept[i]) is nn.Linear for i in (0, 2))
    assert kept(x).equal(model(x))
    with pytest.raises(ValueError, match=r"'0': torch has no product of compressed rows in torch.bfloat16 on cpu"):
        sparse_layout(model, x, "always")


def test_unknown_place(pruned):
    with pytest.raises(ValueError, match="where='foo'"):
        sparse_layout(*pruned, where="foo")
