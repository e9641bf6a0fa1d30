"""Worker programs that tests start, signal and read."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Queue as Line

import sqlalchemy as sa

PATIENCE = 60


class Program:
    """An `apoq worker` that runs, and the lines that it has printed."""

    def __init__(self, *arguments: str, cwd: Path, url: sa.URL) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "apoq", "worker", *arguments],
            cwd=cwd,
            env={**os.environ, "DATABASE_URL": url.render_as_string(hide_password=False)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: Line[str] = Line()
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for printed in self._process.stdout:
            self.output += printed
            self._lines.put(printed)
        self._lines.put("")

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, pattern: str) -> str:
        """Wait for a line that matches the pattern, and return it."""
        deadline = time.monotonic() + PATIENCE
        while printed := self._lines.get(timeout=max(0.0, deadline - time.monotonic())):
            if re.search(pattern, printed):
                return printed
        raise AssertionError(f"it has ended without {pattern}:\n{self.output}")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> int:
        """Wait for its end; return the exit code."""
        return self._process.wait(PATIENCE)

    def stop(self) -> int:
        """Press Ctrl-C, and return the exit code."""
        self.signal(signal.SIGINT)
        return self.end()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(PATIENCE)  # its children have the same output, and end by themselves
        self._process.stdout.close()


def free_ports(number: int) -> int:
    """Return the first of this many ports in a row that were free a moment ago."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                for more in range(1, number):
                    socket.create_server(("127.0.0.1", port + more)).close()
            except OSError:
                continue
        return port
