"""Histograms that count without a lock."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""The upper bounds of the buckets, in seconds."""

LABELS: Final = (*map(str, BOUNDS), "+Inf")


class Histogram:
    """Counts durations by buckets. One thread at a time may add to it; any thread may read it."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * len(LABELS)
        self.sum = 0.0

    def add(self, seconds: float, number: int = 1) -> None:
        """Count a duration, as that of so many tasks."""
        self.counts[bisect_left(BOUNDS, seconds)] += number
        self.sum += seconds * number


def merged(histograms: Iterable[Histogram]) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets of several histograms together, and their sum."""
    totals, total_sum = [0] * len(LABELS), 0.0
    for histogram in histograms:
        total_sum += histogram.sum
        totals = [total + count for total, count in zip(totals, histogram.counts, strict=True)]
    buckets, so_far = [], 0
    for label, count in zip(LABELS, totals, strict=True):
        so_far += count
        buckets.append((label, float(so_far)))
    return buckets, total_sum
