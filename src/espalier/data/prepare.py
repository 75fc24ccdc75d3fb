"""From a dataset's published files to memory-mapped arrays: resumable, and never half written."""

import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from espalier.data.info import DataError, DatasetInfo, info
from espalier.data.sources import SOURCES, Source
from espalier.data.store import array_path, data_root, open_arrays

__all__ = ["Progress", "prepare"]

Progress = Callable[[str, int, int], None]
"""Called with the split, the images written and the images in all."""

CHUNK = 512


def prepare(
    name: str,
    root: str | os.PathLike[str] | None = None,
    raw: str | os.PathLike[str] | None = None,
    download: bool = True,
    size: int = 256,
    progress: Progress = lambda split, done, total: None,
) -> Path:
    """Write {train,test}-{images,labels}.npy of a dataset and return their folder.

    >>> prepare("imagenet", "/nowhere", download=False)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    espalier.data.info.DataError: the published files of imagenet in /nowhere/raw/imagenet cannot be read: ...

    Args:
        name: a dataset of `DATASETS`.
        root: folder of all datasets; without it, what ESPALIER_DATA names.
        raw: folder of the published files, laid out as torchvision does; `root`/raw/`name` without it.
        download: let torchvision fetch missing files (never ImageNet's three archives).
        size: height and width of ImageNet's images: the central square, resized.
        progress: called after every chunk of images.

    Arrays that are whole are left alone; others are written again. A file gets its name when it is complete,
    and a run that was stopped goes on where it was.
    Raises DataError where the published files are missing, corrupt or not what they should be.
    """
    known, folder = info(name), data_root(root)
    place = Path(raw).expanduser() if raw is not None else folder / "raw" / name
    for split in ("train", "test"):
        try:
            open_arrays(known, split, folder)
        except DataError:
            source = _source(known, split, place, download, size)
            _write(known, split, folder, source, progress)
            open_arrays(known, split, folder)
        progress(split, known.count(split), known.count(split))
    return folder / name


def _source(known: DatasetInfo, split: str, raw: Path, download: bool, size: int) -> Source:
    try:
        if download:
            raw.mkdir(parents=True, exist_ok=True)
        source = SOURCES[known.name](raw, split, download, size)
    except ImportError as error:
        hint = "pip install 'espalier[data]' scipy"
        raise ImportError(f"reading the published files of {known.name}: {error} ({hint})") from error
    except Exception as error:  # each of torchvision, pickle, scipy, network and disk has its own kinds
        problem = f"the published files of {known.name} in {raw} cannot be read: {error}"
        hint = "Files that you have already can be put there, laid out as torchvision does."
        raise DataError(known.name, f"{problem}\n{hint}") from error
    if len(source) != known.count(split):
        problem = f"the published files of {known.name} in {raw} have {len(source)} {split} images"
        raise DataError(known.name, f"{problem}, not {known.count(split)}")
    if source.labels.min() < 0 or source.labels.max() >= known.classes:
        span = f"{source.labels.min()} … {source.labels.max()}"
        raise DataError(known.name, f"the published files of {known.name} in {raw} have labels {span}")
    return source


def _write(known: DatasetInfo, split: str, root: Path, source: Source, progress: Progress) -> None:
    """The labels, then the images chunk by chunk, beside a note of how many are done."""
    images, labels = (array_path(known, split, kind, root) for kind in ("images", "labels"))
    images.parent.mkdir(parents=True, exist_ok=True)
    images.unlink(missing_ok=True)  # what is damaged must not look whole once its labels are there
    encoded = BytesIO()
    np.save(encoded, source.labels.astype(np.uint8 if known.classes <= 256 else np.uint16))
    _replace(labels, encoded.getvalue())
    part, note = images.with_suffix(".npy.part"), images.with_suffix(".npy.json")
    shape = (len(source), *source.shape)
    done = _resume(part, note, shape)
    out = open_memmap(part, "r+" if done else "w+", np.uint8, None if done else shape)
    while done < len(source):
        stop = min(done + CHUNK, len(source))
        out[done:stop] = source.read(done, stop)
        out.flush()
        done = stop
        _replace(note, json.dumps({"shape": shape, "done": done}).encode())
        progress(split, done, len(source))
    del out
    part.replace(images)
    note.unlink(missing_ok=True)


def _resume(part: Path, note: Path, shape: tuple[int, ...]) -> int:
    """How many images of an earlier run can be kept; 0 where it was of another shape or is damaged."""
    try:
        found = json.loads(note.read_bytes())
        kept = np.load(part, mmap_mode="r", allow_pickle=False)
        fits = tuple(found["shape"]) == shape == kept.shape and kept.dtype == np.uint8
        return int(found["done"]) if fits else 0
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return 0


def _replace(path: Path, content: bytes) -> None:
    new = path.with_suffix(path.suffix + ".new")
    new.write_bytes(content)
    new.replace(path)
