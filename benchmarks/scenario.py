"""One thing that is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from benchmarks.bench import Bench
from benchmarks.contenders import NAMES

RUNS: Final = 3

MORE_RUNS: Final = 7
"""Of what is over in a third of a second: single ones differ by a third."""


@dataclass(frozen=True)
class Scenario:
    """What is measured, of whom, and against whom."""

    name: str
    title: str
    unit: str
    measure: Callable[[Bench, str], dict[str, float]]
    """One run of one contender: its figures by their names."""
    contenders: tuple[str, ...] = NAMES
    beside: tuple[str, ...] = ()
    """Measures of the application without a queue: they run wherever apoq does."""
    reference: str = "floor"
    """Of whom the others' figures are multiples."""
    less_is_better: bool = False
    runs: int = RUNS
    """How many there are, unless ``--runs`` says."""
    once: bool = False
    """Too long to be run several times."""
    quick: bool = False
    """Part of ``--quick``."""
    units: dict[str, str] | None = None
    """Units of figures that are not in the scenario's."""

    def unit_of(self, figure: str) -> str:
        return (self.units or {}).get(figure, self.unit)
