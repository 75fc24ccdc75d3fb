"""Every method of gradients against the definition, for models and losses that break the fast ones, and odd data."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from espalier.curvature import GradientOptions, WeightLayout, gradients
from espalier.curvature.batches import apply, mapped

torch.manual_seed(0)  # the data of the cases below
METHODS = ("auto", "layers", "vmap", "loop")


def definition(model, loss, data, n, batch, layout):
    """Row i is the gradient of loss(model(mini-batch i)), by plain autograd."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in layout.names]
    rows = []
    for i in range(n):
        x, y = mapped(lambda t, i=i: t[i * batch : (i + 1) * batch], data)
        grads = torch.autograd.grad(loss(apply(model, x), y), wanted, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Two(nn.Module):
    """Two layers; forward is what the cases below change."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class TimeFirst(Two):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x.transpose(0, 1))).mean(0))


class Siamese(Two):
    def forward(self, x):
        left, right = torch.tanh(self.a(torch.cat([x[:, 0], x[:, 1]]))).chunk(2)
        return self.b(left - right)


class Functional(Two):
    def forward(self, x):
        return self.b(torch.tanh(F.linear(x, self.a.weight, self.a.bias)))


class Keyword(Two):
    def forward(self, x):
        return self.b(input=torch.tanh(self.a(input=x)))


class Positions(Two):
    """A linear layer on a buffer without samples; two positions have the shape of two samples."""

    def __init__(self, count):
        super().__init__()
        self.place = nn.Linear(2, 4)
        self.register_buffer("positions", torch.randn(count, 2))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x + self.place(self.positions))).mean(1))


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)

    def forward(self, x):
        return F.linear(torch.tanh(self.a(x)), self.a.weight.t())


def labels(count):
    return torch.randint(3, (count,))


# model, inputs, targets, loss, whether the per-layer products must be refused
CASES = {
    "time first": (TimeFirst, normal(12, 6, 4), labels(12), F.cross_entropy, True),
    "cat along the batch": (Siamese, normal(12, 2, 4), labels(12), F.cross_entropy, True),
    "weight outside its module": (Functional, normal(12, 4), labels(12), F.cross_entropy, True),
    "weight used again": (Reused, normal(12, 4), normal(12, 4), F.mse_loss, True),
    "five positions": (lambda: Positions(5), normal(12, 5, 4), labels(12), F.cross_entropy, True),
    "two positions": (lambda: Positions(2), normal(12, 2, 4), labels(12), F.cross_entropy, True),
    "keyword call": (Keyword, normal(12, 4), labels(12), F.cross_entropy, False),
    "sum": (Two, normal(12, 4), labels(12), lambda o, t: F.cross_entropy(o, t, reduction="sum"), False),
    "class weights": (
        Two,
        normal(12, 4),
        labels(12),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)),
        False,
    ),
    "ignored tokens": (
        Two,
        normal(12, 5, 4),
        torch.randint(3, (12, 5)),
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten(), ignore_index=0),
        False,
    ),
    "a loss that looks at its values": (
        Two,
        normal(12, 4),
        labels(12),
        lambda o, t: F.cross_entropy(o, t) * (2.0 if o.sum().item() > -1e9 else 1.0),
        False,
    ),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_auto_gives_the_definition(case, batch):
    torch.manual_seed(0)
    make, x, y, loss, mixes = CASES[case]
    model = make().double().eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = gradients(model, loss, (x, y), 6, batch, options=GradientOptions(dtype=torch.float64))
    torch.testing.assert_close(found.A, definition(model, loss, (x, y), 6, batch, found.layout))
    assert any("gradients by method='vmap' instead" in str(w.message) for w in said) == mixes


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("case", CASES)
def test_a_method_asked_for_is_right_or_refused(case, method, batch):
    torch.manual_seed(0)
    make, x, y, loss, mixes = CASES[case]
    model = make().double().eval()
    options = GradientOptions(dtype=torch.float64, method=method)
    unfit = (method == "layers" and mixes) or (method == "vmap" and "looks" in case)
    if unfit:
        with pytest.raises(ValueError, match=f"method='{method}' (gives other gradients .*weight|cannot take)"):
            gradients(model, loss, (x, y), 6, batch, options=options)
        return
    found = gradients(model, loss, (x, y), 6, batch, options=options)
    torch.testing.assert_close(found.A, definition(model, loss, (x, y), 6, batch, found.layout))


def test_the_fallback_is_told_once_per_model():
    model, data = TimeFirst().eval(), (torch.randn(12, 6, 4), labels(12))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            gradients(model, F.cross_entropy, data, 6)
    assert [str(w.message)[:34] for w in said] == ["gradients by method='vmap' instead"]


def test_a_loss_that_reads_weights():
    model = Two().double().eval()

    def loss(output, target):
        return F.cross_entropy(output, target) + 1e-6 * model.a.weight.square().sum()

    data = normal(12, 4), labels(12)
    with pytest.warns(UserWarning, match=r"method='loop' instead: .*the loss reads a\.weight"):
        found = gradients(model, loss, data, 6, 2, options=GradientOptions(dtype=torch.float64))
    torch.testing.assert_close(found.A, definition(model, loss, data, 6, 2, found.layout))
    for method in ("layers", "vmap"):
        with pytest.raises(ValueError, match=r"the loss reads a\.weight"):
            gradients(model, loss, data, 6, 2, options=GradientOptions(method=method))


@pytest.mark.parametrize(
    ("layer", "x", "named"),
    [
        (
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
            (4, 2, 5, 5),
            r"0.weight \(Conv2d, padding 'reflect'\)",
        ),
        (nn.Conv1d(2, 3, 3), (4, 2, 5), r"0.weight \(Conv1d\)"),
    ],
)
def test_layers_are_refused_where_they_do_not_cover(layer, x, named):
    model, data = nn.Sequential(layer).eval(), (torch.randn(x), torch.zeros(4))
    with pytest.raises(ValueError, match=f"method='layers' cannot multiply out {named}"):
        gradients(model, lambda o, _: o.square().mean(), data, 4, options=GradientOptions(method="layers"))


def test_rows_in_parts_need_a_mean():
    model, data = Two().eval(), (torch.randn(24, 4), labels(24))
    small = GradientOptions(memory_limit=1)
    assert gradients(model, F.cross_entropy, data, 2, 12, options=small).A.shape == (2, 42)
    for method in ("auto", "loop"):
        options = GradientOptions(memory_limit=1, method=method)
        with pytest.raises(ValueError, match=r"not a mean over samples.*Raise memory_limit to about"):
            gradients(model, CASES["sum"][3], data, 2, 12, options=options)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, z, scale=None):
        h = torch.tanh(self.a(x) + self.b(z))
        return self.o(h if scale is None else h * scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["tuple", "dict", "list", "numpy", "loader"])
def test_several_inputs(kind, method):
    torch.manual_seed(1)
    model, x, z, y = Several().double().eval(), normal(12, 4), normal(12, 4), labels(12)
    named = {"z": z, "x": x, "scale": normal(12, 1)}
    data = {
        "tuple": ((x, z), y),
        "dict": (named, y),
        "list": [([x[:5], z[:5]], y[:5]), ([x[5:], z[5:]], y[5:])],
        "numpy": (((x.numpy(), z.numpy())), y.numpy()),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, z, y), 5, collate_fn=_collate),
    }[kind]
    found = gradients(model, F.cross_entropy, data, 6, 2, options=GradientOptions(dtype=torch.float64, method=method))
    whole = (named, y) if kind == "dict" else ((x, z), y)
    torch.testing.assert_close(found.A, definition(model, F.cross_entropy, whole, 6, 2, found.layout))


def _collate(parts):
    x, z, y = (torch.stack(part) for part in zip(*parts, strict=True))
    return {"x": x, "z": z}, y


def test_a_list_of_two_tensors_is_a_pair():
    model, x, y = Two().eval(), torch.randn(12, 4), labels(12)
    whole = gradients(model, F.cross_entropy, (x, y), 6).A
    assert gradients(model, F.cross_entropy, [x, y], 6).A.equal(whole)
    assert gradients(model, F.cross_entropy, (x.numpy(), y.numpy()), 6).A.equal(whole)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_several_tensors(method):
    class Wrapped(Two):
        def forward(self, x):
            return {"logits": super().forward(x), "hidden": x}

    model, data = Wrapped().double().eval(), (normal(12, 4), labels(12))

    def loss(output, target):
        return F.cross_entropy(output["logits"], target)

    found = gradients(model, loss, data, 6, 2, options=GradientOptions(dtype=torch.float64, method=method))
    torch.testing.assert_close(found.A, definition(model, loss, data, 6, 2, found.layout))


X, Y = torch.randn(12, 4), torch.arange(12) % 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((X[:, :3], Y), r"cannot take inputs of \(1, 3\) \(float32\): a \(Linear\) was given \(1, 3\): mat1 and mat2"),
        (((X, X), Y), r"cannot take inputs of \(\(1, 4\), \(1, 4\)\).*takes 2 positional arguments"),
        ((X, Y + 1), r"the loss cannot take an output of .*int64 from . to 3\): Target 3 is out of bounds"),
        ((X, Y.float()), r"the loss cannot take an output of .* targets of .*float32"),
        ([{"x": X, "labels": Y}], r"a batch is a dict, {'x': \(12, 4\), 'labels': \(12,\)}: a batch must be"),
        ([X, X, X], "a batch is a Tensor"),
        ([(X,)], "a batch has 1 parts"),
        (X, "the data is a Tensor"),
        (None, "the data is a NoneType"),
        (torch.utils.data.TensorDataset(X, Y), r"the data is a Dataset.*DataLoader\(dataset"),
        ([({"x": X, "flag": True}, Y)], "a bool among the data"),
        ([(X, torch.tensor(1))], "a tensor without a batch dimension"),
        ((((X, X[:3])), Y), "inputs of shapes"),
    ],
)
def test_data_that_does_not_fit_is_named(data, said, method):
    data = [data] if isinstance(data, tuple) and isinstance(data[0], tuple) else data
    with pytest.raises(ValueError, match=said):
        gradients(Two().eval(), F.cross_entropy, data, 12, options=GradientOptions(method=method))


@pytest.mark.parametrize("method", METHODS)
def test_a_label_out_of_range_in_a_later_mini_batch(method):
    y = torch.zeros(12, dtype=torch.int64)
    y[9] = 7
    with pytest.raises(
        ValueError, match=r"mini-batches \d+ to \d+: the loss .* 0 to 7\)|mini-batches 9 to 9: the loss"
    ):
        gradients(Two().eval(), F.cross_entropy, (X, y), 12, options=GradientOptions(method=method))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"a tensor of shape \(\d,\)"),
        (lambda o, t: None, "a NoneType"),
        (lambda o, t: o.argmax().float(), "no gradient"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_losses_that_are_none(loss, said, method):
    with pytest.raises(ValueError, match=said):
        gradients(Two().eval(), loss, (X, Y), 6, 2, options=GradientOptions(method=method))


def test_no_grad_around_makes_no_difference():
    model = Two().eval()
    for method in METHODS:
        options = GradientOptions(method=method)
        with torch.no_grad():
            inside = gradients(model, F.cross_entropy, (X, Y), 6, options=options).A
        assert inside.equal(gradients(model, F.cross_entropy, (X, Y), 6, options=options).A)


def test_options_are_checked(tmp_path):
    for wrong, said in (
        ({"method": "foo"}, "method='foo': one of 'auto', 'layers'"),
        ({"method": None}, "method=None"),
        ({"dtype": torch.int8}, "dtype=torch.int8: A is stored in one of"),
        ({"dtype": torch.float16}, "dtype=torch.float16"),
        ({"memory_limit": -1}, "memory_limit=-1: a whole number of bytes"),
        ({"memory_limit": 1e9}, "memory_limit=1000000000.0"),
    ):
        with pytest.raises(ValueError, match=said):
            GradientOptions(**wrong)
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "none" / "A.bin", "there is no folder")):
        with pytest.raises(ValueError, match=said):
            gradients(Two().eval(), F.cross_entropy, (X, Y), 6, options=GradientOptions(path=path))
    with pytest.raises(MemoryError, match=r"memory_limit = .* is more than the .* lower it"):
        gradients(Two().eval(), F.cross_entropy, (X, Y), 6, options=GradientOptions(memory_limit=1 << 60))
    for n, batch in ((6.0, 1), (6, 1.5)):
        with pytest.raises(ValueError, match="whole numbers"):
            gradients(Two().eval(), F.cross_entropy, (X, Y), n, batch)
    assert gradients(Two().eval(), F.cross_entropy, (X, Y), np.int64(6)).A.shape == (6, 42)


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(ValueError, match=r"A cannot be written to .*A\.bin: Permission denied"):
        gradients(Two().eval(), F.cross_entropy, (X, Y), 6, options=GradientOptions(path=tmp_path / "A.bin"))


def test_statistics_over_the_batch_take_no_single_sample():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    model, data = model.double().eval(), (X.double(), Y)
    with pytest.warns(UserWarning, match="method='vmap' instead"):
        found = gradients(model, F.cross_entropy, data, 4, 3, options=GradientOptions(dtype=torch.float64))
    torch.testing.assert_close(found.A, definition(model, F.cross_entropy, data, 4, 3, found.layout))


def test_vmap_says_nothing_of_missing_batching_rules():
    class Warns(Two):
        def forward(self, x):
            if torch._C._functorch.is_functorch_wrapped_tensor(x):
                self.vectorised = True
                warnings.warn("There is a performance drop because we have not yet implemented it", stacklevel=1)
            return super().forward(x)

    model = Warns().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, F.cross_entropy, (X, Y), 12, options=GradientOptions(method="vmap"))
    assert model.vectorised


def test_many_rows_by_chunks_that_were_measured():
    torch.manual_seed(2)
    model, x, y = Two().double().eval(), normal(60, 4), labels(60)
    expected = definition(model, F.cross_entropy, (x, y), 60, 1, WeightLayout.of(model))
    for limit in (1, 3000, 20_000, 1 << 30):
        for method in METHODS:
            options = GradientOptions(dtype=torch.float64, memory_limit=limit, method=method)
            torch.testing.assert_close(gradients(model, F.cross_entropy, (x, y), 60, options=options).A, expected)
