"""Loaders of the papers' datasets, as memory-mapped arrays and vectorised batches."""

from espalier.data._torchvision import import_torchvision as import_torchvision
from espalier.data.augment import Augment as Augment
from espalier.data.batches import Batches as Batches
from espalier.data.dataset import Dataset as Dataset
from espalier.data.digits import digits as digits
from espalier.data.info import DATASETS as DATASETS
from espalier.data.info import DataError as DataError
from espalier.data.prepare import prepare as prepare
from espalier.data.store import load as load
