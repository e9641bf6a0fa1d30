"""One thing that is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.contenders import NAMES


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
    once: bool = False
    """Too long to be run several times."""
    quick: bool = False
    """Part of ``--quick``."""
    units: dict[str, str] | None = None
    """Units of figures that are not in the scenario's."""

    def unit_of(self, figure: str) -> str:
        return (self.units or {}).get(figure, self.unit)
