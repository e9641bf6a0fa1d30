"""Compares apoq with plain psycopg and with other queues: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.contenders import NAMES, chosen, contender
from benchmarks.plots import draw
from benchmarks.process import checkout, import_apoq_from
from benchmarks.progress import Progress
from benchmarks.report import Results, show, show_targets
from benchmarks.scenario import MORE_RUNS, RUNS, Scenario
from benchmarks.scenarios import SCENARIOS
from benchmarks.server import Server
from benchmarks.sizes import Sizes

QUICK = 0.1
QUICK_SECONDS = 50.0
"""With --quick, no step starts after so many seconds, even if the machine is slow."""


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="run only the cheap scenarios, once, at small sizes (one minute)"
    )
    parser.add_argument("--list", action="store_true", help="print the scenarios")
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help="run these; a prefix may end with *")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--runs",
        type=int,
        help=f"number of runs of each scenario ({RUNS}; {MORE_RUNS} of the shortest; with --quick 1)",
    )
    parser.add_argument(
        "--scale", type=float, help=f"factor for all sizes and times (1; with --quick {QUICK})"
    )
    parser.add_argument("--held", type=float, metavar="SECONDS", help="how long to hold the snapshot (600)")
    parser.add_argument(
        "--package", type=checkout, metavar="CHECKOUT", help="measure the apoq of this checkout"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for results.json and the plots")
    return parser.parse_args(words)


def main(options: argparse.Namespace) -> int:
    if options.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:18} {scenario.title}")
        return 0
    try:
        scenarios, names = chosen_scenarios(options), _installed(chosen(options.contenders or list(NAMES)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    scale = options.scale or (QUICK if options.quick else 1.0)
    sizes = Sizes().scaled(scale)
    if options.held:
        sizes = replace(
            sizes, held_seconds=options.held, others_held_seconds=min(options.held, sizes.others_held_seconds)
        )
    runs = options.runs or (1 if options.quick else None)
    begun = time.monotonic()
    # The results so far are shown even if the process is ended by SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Server() as server, tempfile.TemporaryDirectory() as folder:
        if options.package:
            import_apoq_from(options.package, Path(folder))
        results = Results({**server.describe(), "runs": runs or f"{RUNS} or {MORE_RUNS}", "scale": scale})
        try:
            end = begun + QUICK_SECONDS if options.quick else math.inf
            _run(Bench(server, sizes, Path(folder)), scenarios, names, runs, results, end)
        except KeyboardInterrupt:
            results.errors.append("interrupted: the results are incomplete")
    results.machine["seconds"] = round(time.monotonic() - begun)
    show(results, scenarios)
    show_targets(results)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        results.write(options.output / "results.json")
        draw(results, scenarios, options.output)
    for message in results.errors:
        print(f"ERROR {message}", file=sys.stderr)
    return 1 if results.errors else 0


def _installed(names: list[str]) -> list[str]:
    """Return the contenders that are installed, and print what the others need."""
    found = []
    for name in names:
        if missing := contender(name).missing():
            print(f"skipping {name}: not installed: {', '.join(missing)}")
        else:
            found.append(name)
    return found


def _run(
    bench: Bench, scenarios: list[Scenario], names: list[str], runs: int | None, results: Results, end: float
) -> None:
    steps = [
        (scenario, run, name)
        for scenario in scenarios
        for run in range(1 if scenario.once else runs or scenario.runs)
        for name in participants(scenario, names)
    ]
    with Progress(len(steps)) as progress:
        for scenario, run, name in steps:
            if time.monotonic() > end:
                results.skipped.append(f"{scenario.name} of {name}")
                continue
            progress.step(f"{scenario.name} · {name} · run {run + 1}")
            try:
                results.add(scenario.name, name, scenario.measure(bench, name))
            except Exception as error:  # noqa: BLE001 - the other scenarios still run
                results.errors.append(f"{scenario.name}, run {run + 1}: {type(error).__name__}: {error}")


def participants(scenario: Scenario, names: list[str]) -> list[str]:
    """Return the participants of a scenario: the chosen contenders, and the baselines if apoq is chosen."""
    found = [name for name in scenario.contenders if name in names]
    return found + [name for name in scenario.baselines if "apoq" in found]


def chosen_scenarios(options: argparse.Namespace) -> list[Scenario]:
    if not options.only:
        return [scenario for scenario in SCENARIOS if scenario.quick or not options.quick]
    found = []
    for word in options.only:
        matching = [
            scenario
            for scenario in SCENARIOS
            if scenario.name == word or (word.endswith("*") and scenario.name.startswith(word[:-1]))
        ]
        if not matching:
            raise ValueError(f"unknown scenario {word!r}: see --list")
        found += [scenario for scenario in matching if scenario not in found]
    return found


if __name__ == "__main__":
    sys.exit(main(arguments()))
