"""What is known of each dataset, and the error that every fault of its files becomes."""

from dataclasses import dataclass

from espalier.errors import EspalierError

__all__ = ["DATASETS", "DataError", "DatasetInfo", "NoFolder", "info"]


class DataError(EspalierError, RuntimeError):
    """A dataset's file is missing, short or corrupt; the message names it and the command to run."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{problem}\nTo make the arrays of {name}, run: espalier data prepare {name}")


class UnknownDataset(EspalierError, ValueError):
    """No dataset has this name; the message lists those that there are."""


class NoFolder(EspalierError, ValueError):
    """It was not said where the datasets lie; the message says how to."""


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset as published.

    Fields:
        classes: number of classes; labels run from 0.
        shape: [H, W] of grey or [H, W, 3] of colour images; 0 stands for any size.
        train, test: number of images.
        mean, std: per channel, of the training images in 0 … 1.
    """

    name: str
    classes: int
    shape: tuple[int, ...]
    train: int
    test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def count(self, split: str) -> int:
        """Number of images of "train" or "test"."""
        return {"train": self.train, "test": self.test}[split]


_RGB = (32, 32, 3)
_ALL = (
    DatasetInfo("mnist", 10, (28, 28), 60_000, 10_000, (0.1307,), (0.3081,)),
    DatasetInfo("fashion-mnist", 10, (28, 28), 60_000, 10_000, (0.2860,), (0.3530,)),
    DatasetInfo("svhn", 10, _RGB, 73_257, 26_032, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    DatasetInfo("cifar10", 10, _RGB, 50_000, 10_000, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    DatasetInfo("cifar100", 100, _RGB, 50_000, 10_000, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    DatasetInfo("stl10", 10, (96, 96, 3), 5_000, 8_000, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    DatasetInfo("imagenet", 1000, (0, 0, 3), 1_281_167, 50_000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)
DATASETS: dict[str, DatasetInfo] = {known.name: known for known in _ALL}


def info(name: str) -> DatasetInfo:
    """The entry of this name.

    >>> info("svhn").test
    26032
    """
    if name not in DATASETS:
        names = ", ".join(DATASETS)
        raise UnknownDataset(f"{name!r} has no files here; there are {names}; digits comes with scikit-learn")
    return DATASETS[name]
