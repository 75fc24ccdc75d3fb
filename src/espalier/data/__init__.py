"""Loaders of the papers' datasets."""

from espalier.data.dataset import Dataset as Dataset
from espalier.data.digits import digits as digits
