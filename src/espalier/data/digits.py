"""scikit-learn's handwritten digits: 1,797 real 8×8 images (UCI, 250 writers) that come with the package."""

from typing import Any

import numpy as np

from espalier.data.dataset import Dataset, stratified

__all__ = ["digits"]


def digits(split: str = "train", validation: int = 270, test: int = 360, seed: int = 0) -> Dataset:
    """One split of the digits, stratified by class; nothing is downloaded.

    >>> train = digits("train")
    >>> len(train), train.shape, train.classes
    (1167, (1, 8, 8), 10)

    Args:
        split: "train", "validation" or "test".
        validation, test: how many images are held out; the rest are for training.
        seed: of the split. All three splits of one seed are disjoint.

    Images are uint8 [1797, 8, 8] in 0 … 16. Mean and deviation are of the training split alone.
    Raises ImportError where scikit-learn is missing, ValueError for another split.
    """
    bunch: Any = _sklearn().load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
    parts = stratified(labels, [validation, test], seed)
    rows = dict(zip(("validation", "test", "train"), parts, strict=True))
    if split not in rows:
        raise ValueError(f"digits has the splits train, validation and test, not {split!r}")
    sample = images[rows["train"]] / 16
    mean, std = (float(sample.mean()),), (float(sample.std()),)
    return Dataset("digits", split, images, labels, rows[split], 10, mean, std, maximum=16)


def _sklearn() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'espalier[demo]'") from error
    return datasets
