"""From small files of the published formats, which the tests make, to arrays; kills, damage, refusals."""

import hashlib
import importlib
import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from espalier.data import DATASETS, DataError, import_torchvision, load, prepare
from espalier.data.sources import SOURCES, Source
from espalier.data.store import open_arrays

preparing = importlib.import_module("espalier.data.prepare")

Content = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def known(monkeypatch):
    small = replace(DATASETS["mnist"], train=40, test=20)
    monkeypatch.setitem(DATASETS, "mnist", small)
    return small


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def damage_magic(path: Path) -> None:
    path.write_bytes(b"garbage" + path.read_bytes()[7:])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def raw_mnist(raw: Path, rng: np.random.Generator) -> Content:
    folder = raw / "MNIST" / "raw"
    folder.mkdir(parents=True)
    content = {}
    for split, stem, count in (("train", "train", 40), ("test", "t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
        content[split] = images, labels
    return content


def raw_fashion(raw: Path, rng: np.random.Generator) -> Content:
    content = raw_mnist(raw, rng)
    (raw / "MNIST").rename(raw / "FashionMNIST")
    return content


def raw_cifar(raw: Path, rng: np.random.Generator, fine: bool) -> Content:
    folder = raw / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    key, classes = ("fine_labels", 100) if fine else ("labels", 10)
    names = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    content = {}
    for split, files in (("train", names), ("test", ["test" if fine else "test_batch"])):
        count = {"train": 40, "test": 20}[split] // len(files)
        parts = []
        for name in files:
            data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            labels = rng.integers(0, classes, count)
            (folder / name).write_bytes(pickle.dumps({"data": data, key: labels.tolist()}))
            parts.append((data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels))
        content[split] = tuple(np.concatenate(p) for p in zip(*parts, strict=True))
    meta, name = ("meta", "fine_label_names") if fine else ("batches.meta", "label_names")
    (folder / meta).write_bytes(pickle.dumps({name: [str(i) for i in range(classes)]}))
    return content


def raw_svhn(raw: Path, rng: np.random.Generator) -> Content:
    io_ = pytest.importorskip("scipy.io")
    raw.mkdir(parents=True)
    content = {}
    for split, count in (("train", 40), ("test", 20)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(count) % 10
        published = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        io_.savemat(raw / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": published})
        content[split] = images, labels
    return content


def raw_stl10(raw: Path, rng: np.random.Generator) -> Content:
    folder = raw / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "unlabeled_X.bin").touch()  # torchvision wants it there; it is not read
    content = {}
    for split, count in (("train", 40), ("test", 20)):
        images = rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, count)
        images.transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")  # columns first, as published
        (labels + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
        content[split] = images, labels
    return content


MAKE: dict[str, Any] = {
    "mnist": raw_mnist,
    "fashion-mnist": raw_fashion,
    "cifar10": lambda raw, rng: raw_cifar(raw, rng, fine=False),
    "cifar100": lambda raw, rng: raw_cifar(raw, rng, fine=True),
    "svhn": raw_svhn,
    "stl10": raw_stl10,
}


def forget_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision goes on where our small files lack the published md5 sums."""
    datasets = import_torchvision().datasets
    for module in (datasets.cifar, datasets.svhn, datasets.stl10):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


@pytest.fixture
def small(monkeypatch):
    """Every dataset has 40 training and 20 test images."""
    for name, entry in list(DATASETS.items()):
        monkeypatch.setitem(DATASETS, name, replace(entry, train=40, test=20))


@pytest.mark.parametrize("name", MAKE)
def test_prepare_turns_the_published_format_into_arrays(name, small, tmp_path, monkeypatch):
    forget_checksums(monkeypatch)
    content = MAKE[name](tmp_path / "raw" / name, np.random.default_rng(0))
    seen = []
    folder = prepare(name, tmp_path, download=False, progress=lambda *step: seen.append(step))
    assert sorted(p.name for p in folder.iterdir()) == [
        "test-images.npy",
        "test-labels.npy",
        "train-images.npy",
        "train-labels.npy",
    ]
    for split, (images, labels) in content.items():
        got = open_arrays(DATASETS[name], split, tmp_path)
        assert np.array_equal(got[0], images)
        assert np.array_equal(got[1], labels)
    assert seen[-1] == ("test", 20, 20)
    x, y = load(name, "train", tmp_path).tensors(slice(0, 3))
    assert x.shape[1] == len(DATASETS[name].mean)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def tar(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def raw_imagenet(raw: Path, rng: np.random.Generator) -> dict[str, str]:
    """The three archives, with four classes; returns their md5 sums."""
    scipy_io = pytest.importorskip("scipy.io")
    raw.mkdir(parents=True)
    wnids = [f"n{i:08d}" for i in range(4)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array([(i + 1, w, f"thing {i}, other", "gloss", 0) for i, w in enumerate(wnids)], dtype=kinds)
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets})
    truth = "".join(f"{i % 4 + 1}\n" for i in range(20))
    base = "ILSVRC2012_devkit_t12/data"
    devkit = {
        f"{base}/meta.mat": meta.getvalue(),
        f"{base}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    tar(raw / "ILSVRC2012_devkit_t12.tar.gz", devkit, "w:gz")
    classes = {}
    for wnid in wnids:
        tar(raw / "one.tar", {f"{wnid}_{i}.JPEG": jpeg(rng, 50, 40) for i in range(10)})
        classes[f"{wnid}.tar"] = (raw / "one.tar").read_bytes()
    (raw / "one.tar").unlink()
    tar(raw / "ILSVRC2012_img_train.tar", classes)
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(rng, 40, 60) for i in range(20)}
    tar(raw / "ILSVRC2012_img_val.tar", val)
    return {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in raw.iterdir()}


def test_prepare_imagenet_from_its_three_archives(small, tmp_path, monkeypatch):
    module = import_torchvision().datasets.imagenet
    sums = raw_imagenet(tmp_path / "raw" / "imagenet", np.random.default_rng(0))
    monkeypatch.setattr(module, "ARCHIVE_META", {k: (f, sums[f]) for k, (f, _) in module.ARCHIVE_META.items()})
    prepare("imagenet", tmp_path, download=False, size=32)
    for split, count in (("train", 40), ("test", 20)):
        images, labels = open_arrays(DATASETS["imagenet"], split, tmp_path)
        assert images.shape == (count, 32, 32, 3)
        assert np.bincount(labels).tolist() == [count // 4] * 4
        assert labels.dtype == np.uint16


def test_prepare_goes_on_after_a_kill_and_leaves_whole_files_alone(known, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK", 16)
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    reads: list[int] = []

    def opener(stop_at: int) -> Any:
        def read(start: int, stop: int) -> np.ndarray:
            if start >= stop_at:
                raise KeyboardInterrupt
            reads.append(start)
            return images[start:stop]

        def open_split(raw: Path, split: str, download: bool, size: int) -> Source:
            count = known.count(split)
            return Source((28, 28), np.arange(count) % 10, read)

        return open_split

    monkeypatch.setitem(SOURCES, "mnist", opener(32))
    with pytest.raises(KeyboardInterrupt):
        prepare("mnist", tmp_path, download=False)
    assert json.loads((tmp_path / "mnist" / "train-images.npy.json").read_text())["done"] == 32
    with pytest.raises(DataError, match=r"train-images\.npy does not exist"):
        load("mnist", "train", tmp_path)
    monkeypatch.setitem(SOURCES, "mnist", opener(100))
    prepare("mnist", tmp_path, download=False)
    assert reads == [0, 16, 32, 0, 16]  # train in two runs, then test
    assert np.array_equal(open_arrays(known, "train", tmp_path)[0], images)
    prepare("mnist", tmp_path, download=False)
    assert len(reads) == 5


@pytest.mark.parametrize("damage", [damage_short, damage_magic, damage_empty])
def test_prepare_starts_anew_where_the_half_written_file_is_damaged(known, tmp_path, damage):
    content = raw_mnist(tmp_path / "raw" / "mnist", np.random.default_rng(0))
    folder = tmp_path / "mnist"
    folder.mkdir()
    part = folder / "train-images.npy.part"
    np.lib.format.open_memmap(part, "w+", np.uint8, (40, 28, 28)).flush()
    (folder / "train-images.npy.json").write_text(json.dumps({"shape": [40, 28, 28], "done": 16}))
    damage(part)
    prepare("mnist", tmp_path, download=False)
    assert np.array_equal(open_arrays(known, "train", tmp_path)[0], content["train"][0])


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_prepare_mends_damaged_arrays(known, tmp_path, kind):
    content = raw_mnist(tmp_path / "raw" / "mnist", np.random.default_rng(0))
    prepare("mnist", tmp_path, download=False)
    damage_short(tmp_path / "mnist" / f"train-{kind}.npy")
    prepare("mnist", tmp_path, download=False)
    for got, made in zip(open_arrays(known, "train", tmp_path), content["train"], strict=True):
        assert np.array_equal(got, made)


@pytest.mark.parametrize("damage", [damage_short, damage_magic, damage_empty, damage_missing])
def test_prepare_names_corrupt_published_files(known, tmp_path, damage):
    raw = tmp_path / "raw" / "mnist"
    raw_mnist(raw, np.random.default_rng(0))
    damage(raw / "MNIST" / "raw" / "train-images-idx3-ubyte")
    with pytest.raises(DataError) as error:
        prepare("mnist", tmp_path, download=False)
    assert str(raw) in str(error.value)
    assert "espalier data prepare mnist" in str(error.value)


def test_prepare_refuses_too_few_images_and_foreign_labels(known, tmp_path, monkeypatch):
    raw_mnist(tmp_path / "raw" / "mnist", np.random.default_rng(0))
    monkeypatch.setitem(DATASETS, "mnist", replace(known, train=41))
    with pytest.raises(DataError, match="40 train images, not 41"):
        prepare("mnist", tmp_path, download=False)
    monkeypatch.setitem(DATASETS, "mnist", replace(known, classes=5))
    with pytest.raises(DataError, match="have labels 0 … 9"):
        prepare("mnist", tmp_path, download=False)


def test_prepare_downloads_nothing_that_is_there(known, tmp_path):
    raw_mnist(tmp_path / "raw" / "mnist", np.random.default_rng(0))
    prepare("mnist", tmp_path, download=True)
    assert len(load("mnist", "test", tmp_path)) == 20
