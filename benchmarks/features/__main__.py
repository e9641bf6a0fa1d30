"""Measures single features of apoq on a private server: ``python -m benchmarks.features --help``.

Each figure is shown with the bound that it should keep. The machine should be idle.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

from benchmarks.features.graphs import chain, group, pairs
from benchmarks.features.keys import full_key, hand_over, held_places, rates
from benchmarks.features.laboratory import Figure, Laboratory
from benchmarks.features.metrics import metrics
from benchmarks.features.pauses import paused_workers, pauses
from benchmarks.features.schedules import ticks

MEASUREMENTS: Final[dict[str, Callable[[Laboratory], list[Figure]]]] = {
    "ticks": ticks,
    "pauses": pauses,
    "paused_workers": paused_workers,
    "hand_over": hand_over,
    "held_places": held_places,
    "keyed": rates,
    "full_key": full_key,
    "group": group,
    "chain": chain,
    "pairs": pairs,
    "metrics": metrics,
}


def main() -> None:
    """Run the chosen measurements."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MEASUREMENTS)} (all)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all sizes and times (1)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MEASUREMENTS):
        parser.error(f"NAME must be one of {', '.join(MEASUREMENTS)}, got {', '.join(unknown)}")
    with Laboratory(options.scale) as laboratory:
        for name in options.names or MEASUREMENTS:
            for figure in MEASUREMENTS[name](laboratory):
                bound = f"  ({figure.bound})" if figure.bound else ""
                print(f"{name:12} {figure.title:52} {figure.value:12,.2f} {figure.unit}{bound}", flush=True)


if __name__ == "__main__":
    main()
