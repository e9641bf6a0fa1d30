"""A server of a test's own that can be stopped, and started again with all its data."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import CDLL
from functools import partial
from pathlib import Path

import probe
import sqlalchemy as sa
from waiting import patience

from apoq.embedded import PostgreSQL

until = patience(60.0)

QUICK = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class Server:
    """The server behind a URL of `apoq.embedded`."""

    def __init__(self, url: str) -> None:
        self.url = sa.make_url(url)
        self._folder = Path(str(self.url.query["host"]))
        self._command = shlex.split((self._folder / "data" / "postmaster.opts").read_text())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_restarted(self) -> bool:
        return self._process is not None

    def stop(self) -> None:
        """Stop it as `pg_ctl stop -m fast` does, which ends all sessions."""
        pid_file = self._folder / "data" / "postmaster.pid"
        if self._process is None:
            os.kill(int(pid_file.read_text().split()[0]), signal.SIGINT)
        else:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
        until(lambda: not pid_file.exists())

    def start(self) -> None:
        """Start it again, and wait until it takes connections."""
        # PR_SET_PDEATHSIG: tests that are killed take it along.
        with_tests: Callable[[], object] | None = None
        if sys.platform == "linux":
            with_tests = partial(CDLL(None).prctl, 1, signal.SIGINT)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            env={"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self._folder)},
            preexec_fn=with_tests,  # noqa: PLW1509 - it imports nothing, and takes no lock
            **probe.server_user(),
        )
        until(self._answers)

    def _answers(self) -> bool:
        engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        with suppress(sa.exc.OperationalError), engine.connect():
            return True
        return False


@contextmanager
def restartable() -> Iterator[Server]:
    """Start a server that can be stopped and started again; it is gone after the block."""
    with PostgreSQL(settings=QUICK) as postgresql:
        server = Server(postgresql.url)
        try:
            yield server
        finally:
            if server.is_restarted:
                server.stop()
