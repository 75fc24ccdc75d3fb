"""The rows of the tables, in words, for the terminal and the page alike."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from espalier.report.results import Check, Measurement


class Change(NamedTuple):
    """One quantity of two networks."""

    name: str
    before: str
    after: str
    change: str


def before_and_after(networks: Mapping[str, Measurement]) -> list[Change]:
    """Parameters, MACs, latency and accuracy of the first and the last of ``networks``.

    >>> before_and_after({"full": Measurement(10, 40, 2e-3, 8), "small": Measurement(5, 30, 1e-3, 8)})[0]
    Change(name='parameters', before='10', after='5', change='−50 %')
    """
    if len(networks) < 2:
        return []
    first, *_, last = networks.values()
    rows = [
        Change("parameters", f"{first.params:,}", f"{last.params:,}", _percent(first.params, last.params)),
        Change("MACs per example", f"{first.macs:,}", f"{last.macs:,}", _percent(first.macs, last.macs)),
        Change(
            f"latency, batch of {first.batch}",
            f"{1e3 * first.latency:.3g} ms",
            f"{1e3 * last.latency:.3g} ms",
            _percent(first.latency, last.latency),
        ),
    ]
    if first.accuracy is not None and last.accuracy is not None:
        points = 100 * (last.accuracy - first.accuracy)
        change = "±0" if abs(points) < 0.005 else f"{points:+.2f} points".replace("-", "−")
        rows.append(Change("test accuracy", f"{100 * first.accuracy:.2f} %", f"{100 * last.accuracy:.2f} %", change))
    return rows


def check_rows(checks: Sequence[Check]) -> list[tuple[str, str, str, str, bool]]:
    """(name, detail, difference, bound, whether it holds) of every check."""
    return [(c.name, c.detail, f"{c.difference:.2g}", f"{c.bound:.2g}", c.passed) for c in checks]


def _percent(before: float, after: float) -> str:
    if not before:
        return ""
    change = 100 * (after - before) / before
    return f"{change:+.0f} %".replace("-", "−") if abs(change) >= 0.5 else "±0 %"
