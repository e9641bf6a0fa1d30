"""Where the time goes, each measured on a server of its own: ``python -m benchmarks.profile --help``."""

from __future__ import annotations

import argparse

from benchmarks.profile import latency, sessions, working

PROFILES = {"working": working.show, "sessions": sessions.show, "latency": latency.show}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("profiles", nargs="*", choices=PROFILES, help="all of them, if none is named")
    for name in parser.parse_args().profiles or PROFILES:
        PROFILES[name]()
