"""Datasets as memory-mapped arrays: where they lie, whether they are whole, and their splits."""

import os
from pathlib import Path

import numpy as np

from espalier.data.dataset import Dataset, stratified
from espalier.data.digits import digits
from espalier.data.info import DataError, DatasetInfo, NoFolder, info

__all__ = ["ENVIRONMENT", "data_root", "load", "open_arrays"]

ENVIRONMENT = "ESPALIER_DATA"


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder of all datasets: `root`, or what the environment variable ESPALIER_DATA names.

    >>> data_root("/data")
    PosixPath('/data')
    """
    found = root if root is not None else os.environ.get(ENVIRONMENT)
    if not found:
        raise NoFolder(f"no folder for datasets: give root=… (--root), or set {ENVIRONMENT} to a folder")
    return Path(found).expanduser()


def load(
    name: str,
    split: str = "train",
    root: str | os.PathLike[str] | None = None,
    validation: int | float = 0.1,
    seed: int = 0,
) -> Dataset:
    """One split of a prepared dataset; the images stay on disk until they are asked for.

    >>> data = load("digits", "validation", validation=200)
    >>> len(data), data.shape
    (200, (1, 8, 8))

    Args:
        name: mnist, fashion-mnist, svhn, cifar10, cifar100, stl10, imagenet; or digits, which needs no files.
        split: "train" and "validation" share the published training images and never overlap; "test" is the
            published test set (of ImageNet, the published validation set), to be looked at once.
        root: see `data_root`.
        validation: how many training images are held out, as a number or a fraction; 0 for none.
        seed: of the held-out images, which are stratified by class.

    The means and deviations are of the whole published training set.
    Raises DataError, which names the file and the command to run, where a file is missing, short or corrupt.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is train, validation or test, not {split!r}")
    if name == "digits":
        return digits(split, validation=_held_out(validation, 1797), seed=seed)
    known = info(name)
    images, labels = open_arrays(known, "test" if split == "test" else "train", data_root(root))
    if split == "test":
        rows = np.arange(len(labels))
    else:
        held_out, rest = stratified(labels, [_held_out(validation, len(labels))], seed)
        rows = rest if split == "train" else held_out
    return Dataset(name, split, images, labels, rows, known.classes, known.mean, known.std)


def open_arrays(known: DatasetInfo, split: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """The memory-mapped images and labels of "train" or "test", checked; see `load`."""
    paths = [array_path(known, split, kind, root) for kind in ("images", "labels")]
    images, labels = (_open(known, path) for path in paths)
    expected = (known.count(split), *known.shape)
    fits = len(images.shape) == len(expected) and all(
        want in (0, have) for have, want in zip(images.shape, expected, strict=True)
    )
    if images.dtype != np.uint8 or not fits:
        raise DataError(known.name, f"{paths[0]} holds {_what(images)}, not uint8 {list(expected)}")
    if labels.dtype.kind not in "ui" or labels.shape != (len(images),):
        raise DataError(known.name, f"{paths[1]} holds {_what(labels)}, not integers [{len(images)}]")
    if labels.min() < 0 or labels.max() >= known.classes:
        span = f"{labels.min()} … {labels.max()}"
        raise DataError(known.name, f"{paths[1]} has labels {span}, outside 0 … {known.classes - 1}")
    return images, labels


def array_path(known: DatasetInfo, split: str, kind: str, root: Path) -> Path:
    """Where the "images" or "labels" of "train" or "test" lie."""
    return root / known.name / f"{split}-{kind}.npy"


def _open(known: DatasetInfo, path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(known.name, f"{path} does not exist") from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(known.name, f"{path} is corrupt or short: {error}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(known.name, f"{path} is not a .npy file")
    return array


def _what(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _held_out(validation: int | float, count: int) -> int:
    number = round(validation * count) if isinstance(validation, float) else validation
    if not 0 <= number < count:
        raise ValueError(f"cannot hold out {validation} of {count} training images")
    return number
