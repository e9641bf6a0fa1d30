"""The definition of a scenario."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from benchmarks.bench import Bench
from benchmarks.contenders import NAMES

RUNS: Final = 3

MORE_RUNS: Final = 7
"""Number of runs of scenarios that take a third of a second: single runs differ by a third."""


@dataclass(frozen=True)
class Scenario:
    """A measurement, with its contenders and the reference to compare them with."""

    name: str
    title: str
    unit: str
    measure: Callable[[Bench, str], dict[str, float]]
    """Runs one contender once, and returns its figures by name."""
    contenders: tuple[str, ...] = NAMES
    baselines: tuple[str, ...] = ()
    """Measurements without a queue, which run whenever apoq does."""
    reference: str = "floor"
    """The contender by whose figures the others' are divided."""
    less_is_better: bool = False
    runs: int = RUNS
    """The number of runs, unless ``--runs`` is given."""
    once: bool = False
    """Whether there is only one run, because it takes long."""
    quick: bool = False
    """Whether it is part of ``--quick``."""
    units: dict[str, str] | None = None
    """Units of figures whose unit isn't the scenario's."""

    def unit_of(self, figure: str) -> str:
        return (self.units or {}).get(figure, self.unit)
