"""Reports the figures of all runs with medians, spreads and ratios, as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.scenario import Scenario
from benchmarks.targets import TARGETS


@dataclass
class Results:
    """Every figure of every run: scenario, figure, contender, values."""

    machine: dict[str, Any]
    figures: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, scenario: str, name: str, found: dict[str, float]) -> None:
        for figure, value in found.items():
            self.figures.setdefault(scenario, {}).setdefault(figure, {}).setdefault(name, []).append(value)

    def median(self, scenario: str, figure: str, name: str) -> float | None:
        values = self.figures.get(scenario, {}).get(figure, {}).get(name)
        return statistics.median(values) if values else None

    def write(self, path: Path) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        document = {"when": when, "machine": self.machine, "figures": self.figures, "errors": self.errors}
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show(results: Results, scenarios: list[Scenario]) -> None:
    """Print a table for each scenario."""
    print("\n" + " · ".join(f"{key} {value}" for key, value in results.machine.items()))
    for scenario in scenarios:
        figures = results.figures.get(scenario.name, {})
        if not figures:
            continue
        direction = ", lower is better" if scenario.less_is_better else ""
        print(f"\n{scenario.name}: {scenario.title}{direction}")
        for figure, values in figures.items():
            if " part " in figure:
                continue  # only for the plots
            unit = scenario.unit_of(figure)
            against = f"/ {scenario.reference}" if scenario.reference in values and len(values) > 1 else ""
            print(
                f"  {figure + (f', {unit}' if unit else ''):30} "
                f"{'median':>12} {'min':>12} {'max':>12}  {against}"
            )
            reference = results.median(scenario.name, figure, scenario.reference)
            for name, found in values.items():
                middle = statistics.median(found)
                ratio = (
                    f"{middle / reference:8.2f}"
                    if reference and against and name != scenario.reference
                    else ""
                )
                print(
                    f"    {name:28} "
                    f"{number(middle):>12} {number(min(found)):>12} {number(max(found)):>12}  {ratio}"
                )


def number(value: float) -> str:
    """Format a figure with about three significant digits."""
    if abs(value) >= 100:  # noqa: PLR2004
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"  # noqa: PLR2004


def show_targets(results: Results) -> None:
    """Print which targets were reached, if their figures were measured."""
    if results.skipped:
        print(f"\nskipped, because the time was up: {', '.join(results.skipped)}")
    lines = []
    for target in TARGETS:
        value = target.value(results.median)
        if value is not None:
            reached = value >= target.bound if target.at_least else value <= target.bound
            sign = "≥" if target.at_least else "≤"
            mark = "reached" if reached else "MISSED"
            lines.append(f"  {target.title:78} {number(value):>8} {sign} {number(target.bound):<6} {mark}")
    if lines:
        print("\ntargets\n" + "\n".join(lines))
