"""Profiles single parts of apoq, each on its own server: ``python -m benchmarks.profile --help``."""

from __future__ import annotations

import argparse

from benchmarks.profile import adding, latency, layouts, processes, sessions, working

PROFILES = {
    "working": working.show,
    "processes": processes.show,
    "sessions": sessions.show,
    "latency": latency.show,
    "layouts": layouts.show,
    "adding": adding.show,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("profiles", nargs="*", metavar="PROFILE", help=f"{', '.join(PROFILES)} (all)")
    chosen = parser.parse_args().profiles or list(PROFILES)
    if unknown := set(chosen) - PROFILES.keys():
        parser.error(f"unknown profile: {', '.join(sorted(unknown))}")
    for name in chosen:
        PROFILES[name]()
