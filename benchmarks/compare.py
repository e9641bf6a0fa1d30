"""Compares two checkouts of apoq in turn: ``python -m benchmarks.compare --help``.

Each scenario runs with the old checkout, twice with the new one, and with the old one again, so that a
machine that becomes slower or faster affects both equally. Everything but apoq comes from this checkout. The
other contenders that are given (``--contenders apoq floor``) show how far the same program differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.process import ROOT, checkout
from benchmarks.report import number

ORDER: Final = ("old", "new", "new", "old")

Figures = dict[str, dict[str, list[float]]]
"""The values of each figure and contender."""


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("old", type=checkout, help="checkout of apoq")
    parser.add_argument("new", type=checkout, help="another one")
    parser.add_argument("--only", nargs="+", required=True, metavar="SCENARIO", help="as in benchmarks")
    parser.add_argument("--contenders", nargs="+", default=["apoq"], metavar="NAME", help="apoq")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of old, new, new, old (1)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all sizes and times (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all figures")
    return parser.parse_args(words)


def main(options: argparse.Namespace) -> int:
    found: dict[str, dict[str, Figures]] = {}
    for scenario in _names(options.only):
        sides: dict[str, Figures] = {"old": {}, "new": {}}
        for side in ORDER * options.rounds:
            print(f"{scenario} · {side}", file=sys.stderr, flush=True)
            _add(sides[side], _run(scenario, getattr(options, side), options))
        found[scenario] = sides
        _show(scenario, sides)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _names(words: list[str]) -> list[str]:
    # Imported here, because the scenarios import apoq.
    from benchmarks.__main__ import arguments, chosen_scenarios

    return [scenario.name for scenario in chosen_scenarios(arguments(["--only", *words]))]


def _run(scenario: str, package: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run a scenario once; return its figures by figure and contender."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--only", scenario, "--contenders", *options.contenders, "--scale", str(options.scale)]
        words += ["--runs", "1", "--package", str(package), "--output", folder]
        command = [sys.executable, "-m", "benchmarks", *words]
        # It prints its errors, and the other runs go on.
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        document = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = document["figures"].get(scenario, {})
    return found


def _add(figures: Figures, run: dict[str, dict[str, Any]]) -> None:
    for figure, contenders in run.items():
        for name, values in contenders.items():
            figures.setdefault(figure, {}).setdefault(name, []).extend(values)


def _show(scenario: str, sides: dict[str, Figures]) -> None:
    print(f"\n{scenario}\n{'':48} {'old':>26} {'new':>26} {'new / old':>10}")
    for figure, contenders in sides["old"].items():
        for name, old in contenders.items():
            if new := sides["new"].get(figure, {}).get(name):
                middle = statistics.median(old)
                ratio = f"{statistics.median(new) / middle:.2f}" if middle else ""
                print(f"{figure + ', ' + name:48} {_spread(old):>26} {_spread(new):>26} {ratio:>10}")
    sys.stdout.flush()


def _spread(values: list[float]) -> str:
    """Return the median with the lowest and the highest value."""
    return f"{number(statistics.median(values))} ({number(min(values))}-{number(max(values))})"


if __name__ == "__main__":
    sys.exit(main(arguments()))
