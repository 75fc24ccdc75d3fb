"""Several seeds in one cell of a table."""

from collections.abc import Iterable
from statistics import mean, stdev


def spread(values: Iterable[float], digits: int = 2) -> str:
    """The mean and, of several values, the sample deviation.

    >>> spread([1.0, 2.0]), spread([3.0], 1)
    ('1.50 ± 0.71', '3.0')
    """
    values = list(values)
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"
