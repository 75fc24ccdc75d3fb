"""Datasets: arrays on disk, good and bad; splits; the real data where it is at hand."""

import doctest
import importlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from espalier.data import DATASETS, Augment, Batches, DataError, digits, load
from espalier.data.dataset import stratified
from espalier.data.store import data_root

FILES = ("_torchvision", "augment", "batches", "dataset", "digits", "info", "prepare", "store")


def real(name: str) -> pytest.MarkDecorator:
    """Real images are too large for the repository: CI unpacks them; elsewhere `espalier data prepare` does."""
    folder = Path(os.environ.get("ESPALIER_DATA") or "nowhere") / name
    return pytest.mark.skipif(not folder.is_dir(), reason=f"not in the repository: espalier data prepare {name}")


@pytest.mark.parametrize("name", FILES)
def test_examples_of_the_docstrings(name):
    assert doctest.testmod(importlib.import_module(f"espalier.data.{name}")).failed == 0


@pytest.fixture
def known(monkeypatch):
    small = replace(DATASETS["mnist"], train=40, test=20)
    monkeypatch.setitem(DATASETS, "mnist", small)
    return small


@pytest.fixture
def arrays(known, tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for split, count in (("train", 40), ("test", 20)):
        np.save(folder / f"{split}-images.npy", np.full((count, 28, 28), 7, np.uint8))
        np.save(folder / f"{split}-labels.npy", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_load_gives_memory_mapped_disjoint_stratified_splits(arrays):
    train, held, test = (load("mnist", split, arrays, validation=10) for split in ("train", "validation", "test"))
    assert isinstance(train.images, np.memmap)
    assert (len(train), len(held), len(test)) == (30, 10, 20)
    assert sorted([*train.rows, *held.rows]) == list(range(40))
    assert np.bincount(held.raw()[1]).tolist() == [1] * 10
    assert load("mnist", "validation", arrays, validation=0.25).rows.tolist() == held.rows.tolist()
    assert load("mnist", "validation", arrays, validation=10, seed=1).rows.tolist() != held.rows.tolist()
    assert len(load("mnist", "train", arrays, validation=0)) == 40


def test_the_root_comes_from_the_environment(arrays, monkeypatch):
    monkeypatch.setenv("ESPALIER_DATA", str(arrays))
    assert len(load("mnist", "test")) == 20
    monkeypatch.delenv("ESPALIER_DATA")
    with pytest.raises(ValueError, match="set ESPALIER_DATA"):
        data_root()


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def damage_magic(path: Path) -> None:
    path.write_bytes(b"garbage" + path.read_bytes()[7:])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_pickle(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def damage_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize(
    "damage",
    [damage_missing, damage_short, damage_magic, damage_empty, damage_pickle, damage_archive],
)
def test_bad_files_are_named_with_the_command_to_run(arrays, damage, kind):
    path = arrays / "mnist" / f"train-{kind}.npy"
    damage(path)
    with pytest.raises(DataError) as error:
        load("mnist", "train", arrays)
    assert str(path) in str(error.value)
    assert "espalier data prepare mnist" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        ("images", np.zeros((39, 28, 28), np.uint8), "uint8 [39, 28, 28], not uint8 [40, 28, 28]"),
        ("images", np.zeros((40, 28, 28), np.float32), "float32"),
        ("images", np.zeros((40, 28, 27), np.uint8), "[40, 28, 27]"),
        ("images", np.zeros((40, 28, 28, 1), np.uint8), "[40, 28, 28, 1]"),
        ("labels", np.zeros(39, np.uint8), "not integers [40]"),
        ("labels", np.zeros(40, np.float32), "not integers"),
        ("labels", np.zeros((40, 1), np.uint8), "not integers"),
        ("labels", np.full(40, 10, np.uint8), "labels 10 … 10, outside 0 … 9"),
        ("labels", np.full(40, -1, np.int64), "outside 0 … 9"),
    ],
)
def test_wrong_arrays_are_named(arrays, kind, array, message):
    np.save(arrays / "mnist" / f"train-{kind}.npy", array)
    with pytest.raises(DataError) as error:
        load("mnist", "train", arrays)
    assert message in str(error.value)
    assert f"train-{kind}.npy" in str(error.value)


def test_wrong_arguments_are_refused(arrays):
    with pytest.raises(ValueError, match="no files here"):
        load("mnits", "train", arrays)
    with pytest.raises(ValueError, match="train, validation or test"):
        load("mnist", "val", arrays)
    with pytest.raises(ValueError, match="cannot hold out"):
        load("mnist", "train", arrays, validation=40)
    with pytest.raises(ValueError, match="digits has the splits"):
        digits("all")


def test_stratified_parts_are_disjoint_exact_and_frozen():
    labels = np.random.RandomState(0).randint(0, 7, 1003)
    a, b, rest = stratified(labels, [100, 250], seed=3)
    assert (len(a), len(b), len(rest)) == (100, 250, 653)
    assert sorted([*a, *b, *rest]) == list(range(1003))
    share = np.bincount(labels) / len(labels)
    assert np.abs(np.bincount(labels[a]) - 100 * share).max() < 1
    assert a[:5].tolist() == stratified(labels, [100], seed=3)[0][:5].tolist()
    with pytest.raises(ValueError, match="out of 1003"):
        stratified(labels, [1004], seed=0)


def test_digits_are_real_disjoint_and_stratified():
    parts = [digits(split) for split in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [1167, 270, 360]
    assert sorted(np.concatenate([p.rows for p in parts])) == list(range(1797))
    share = np.bincount(parts[0].labels) / 1797
    assert all(np.abs(np.bincount(p.raw()[1]) - len(p) * share).max() < 1.5 for p in parts)
    x, _ = parts[0].tensors()
    assert x.mean().abs() < 1e-5
    assert (x.std() - 1).abs() < 1e-3


@pytest.mark.parametrize("name", [pytest.param(n, marks=real(n)) for n in ("mnist", "fashion-mnist", "cifar10")])
def test_real_data_has_the_published_sizes_means_and_deviations(name):
    data = load(name, "train", validation=0)
    known = DATASETS[name]
    assert (len(data), len(load(name, "test"))) == (known.train, known.test)
    assert (len(load(name)), len(load(name, "validation"))) == (
        54_000 * known.train // 60_000,
        known.train // 10,
    )
    axes = (0, 1, 2)
    images = np.asarray(data.images)
    mean, std = images.mean(axes) / 255, images.std(axes) / 255
    np.testing.assert_allclose(np.atleast_1d(mean), known.mean, atol=2e-4)
    np.testing.assert_allclose(np.atleast_1d(std), known.std, atol=2e-3)
    assert np.bincount(data.labels, minlength=10).min() > 5000 * known.train // 60_000


@real("fashion-mnist")
def test_a_network_learns_from_real_batches():
    from espalier.models import DemoNet

    data = load("fashion-mnist")
    torch.manual_seed(0)
    model = DemoNet(0.125, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _, (images, labels) in zip(range(40), Batches(data, 64, augment=Augment(pad=2)), strict=False):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
