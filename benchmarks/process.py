"""Child processes of the benchmark, with which it communicates in lines of text and JSON."""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent


class ChildFailed(RuntimeError):
    """A process of the benchmark has died, or has not responded in time."""


def checkout(words: str) -> Path:
    """Return the folder of a checkout that is given on the command line."""
    folder = Path(words).resolve()
    if not (folder / "apoq").is_dir():
        raise argparse.ArgumentTypeError(f"a checkout must have a folder apoq, got {words}")
    return folder


def import_apoq_from(place: Path, folder: Path) -> None:
    """Let the child processes import apoq from another checkout; all else still comes from this one."""
    (folder / "apoq").symlink_to(place / "apoq")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), *_paths()])


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


class Child:
    """``python -m benchmarks.child`` with a role; it is ended when the `with` block is left."""

    program = "benchmarks.child"

    def __init__(self, role: str, **task: Any) -> None:
        self.role = role
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            # -P: the current folder doesn't come before the checkout of `import_apoq_from`.
            [sys.executable, "-P", "-m", self.program, role, json.dumps(task)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*_paths(), str(ROOT)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def say(self, word: str) -> None:
        """Send a line to the process."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildFailed(f"the process {self.role!r} has ended: {self._last_errors()}") from None

    def receive(self, timeout: float = 60) -> dict[str, Any]:
        """Wait for the process's next line, and return its JSON."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise ChildFailed(f"the process {self.role!r} has not responded in {timeout:.0f} s") from None
        if line is None:
            self._process.wait()
            raise ChildFailed(
                f"the process {self.role!r} ended with {self._process.returncode}: {self._last_errors()}"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, word: str, timeout: float = 60) -> dict[str, Any]:
        """Send a line to the process, and return its response."""
        self.say(word)
        return self.receive(timeout)

    def _last_errors(self) -> str:
        time.sleep(0.05)
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()[-2000:]
