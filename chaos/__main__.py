"""Tests apoq under faults: no task may be lost or take effect twice. See ``python -m chaos --help``."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.progress import Progress
from chaos import graphs, places, recycling  # noqa: F401 - they register scenarios
from chaos.scenarios import SCENARIOS, Options
from chaos.server import Place, Server, Skipped
from chaos.stage import LIMITS, SLOTS

QUICK_SECONDS = 95.0
"""With --quick, no scenario starts after so many seconds."""

COLUMNS = {
    "scenario": 21,
    "offered": 8,
    "maybe": 6,
    "completed": 10,
    "lost": 5,
    "failed": 7,
    "doubled": 8,
    "overshot": 9,
    "effects_lost": 13,
    "wasted": 7,
    "claimed_again": 14,
    "failures": 9,
    "rescued": 8,
    "elsewhere": 10,
    "full_speed": 11,
    "all_work": 9,
    "slots": 6,
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run only the short scenarios (two minutes)")
    parser.add_argument("--list", action="store_true", help="print the scenarios")
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", choices=SCENARIOS, help="run these")
    parser.add_argument("--rate", type=float, help="tasks per second (300; in the scenario hour 500)")
    parser.add_argument("--minutes", type=float, default=60, help="duration of the scenario hour (60)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the faults in the scenario hour (1)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for results.json and the logs")
    return parser.parse_args(words)


def main(options: argparse.Namespace) -> int:
    if options.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:{COLUMNS['scenario']}} {scenario.title}")
        return 0
    names = options.only or [
        name
        for name, scenario in SCENARIOS.items()
        if (scenario.is_quick if options.quick else scenario.is_default)
    ]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="apoq-chaos-") as temporary:
        folder = options.output or Path(temporary)
        with Place() as place:
            _run(place, names, folder, options, results)
        if options.output:
            document = json.dumps(results, indent=1, default=str).replace("Infinity", '"never"')
            (folder / "results.json").write_text(document + "\n", encoding="utf-8")
    misses = [f"{name}: {miss}" for name, found in results.items() for miss in missed(found)]
    print(
        "\n".join(f"MISSED {miss}" for miss in misses)
        or "No task was lost or took effect twice, and all targets were met."
    )
    return 1 if misses else 0


def _run(
    place: Place,
    names: list[str],
    folder: Path,
    options: argparse.Namespace,
    results: dict[str, dict[str, Any]],
) -> None:
    begun = time.monotonic()
    server = Server(place, place.folder / "data").create()
    print(" ".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    with Progress(len(names)) as progress:
        for name in names:
            if options.quick and time.monotonic() - begun > QUICK_SECONDS:
                results[name] = {"skipped": "the time was up"}
                continue
            progress.step(name)
            rate = options.rate or (500 if name == "hour" else 300)
            chosen = Options(rate, options.seed, options.minutes, options.quick)
            try:
                results[name] = SCENARIOS[name].run(place, server, folder / name, chosen)
            except Skipped as reason:
                results[name] = {"skipped": str(reason)}
            except Exception as error:  # noqa: BLE001 - the other scenarios still run
                results[name] = {"error": f"{type(error).__name__}: {error}"}
                if not server.is_running:
                    server.start()
            show(name, results[name])


def show(name: str, found: dict[str, Any]) -> None:
    """Print a scenario's row."""
    if "offered" not in found:
        print(f"{name:>{COLUMNS['scenario']}} {found}", flush=True)
        return
    print(
        " ".join(f"{_text({'scenario': name, **found}.get(key)):>{width}}" for key, width in COLUMNS.items()),
        flush=True,
    )
    for what, most in found["limits"].items():
        if LIMITS.get(what) != most:
            print(f"{'':{COLUMNS['scenario']}} {what}: {_text(found[what])} (at most {most})", flush=True)


def missed(found: dict[str, Any]) -> list[str]:
    """Return a message for each target that a scenario has missed."""
    if "skipped" in found:
        return []
    if "error" in found:
        return [found["error"]]
    misses = [
        f"{what}: {_text(found[what])}, must be at most {most}"
        for what, most in found["limits"].items()
        if found[what] is not None and found[what] > most
    ]
    if found.get("slots", SLOTS) < SLOTS:
        misses.append(f"only {found['slots']} of {SLOTS} slots still work")
    return misses


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "never" if math.isinf(value) else f"{value:.1f}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main(arguments()))
