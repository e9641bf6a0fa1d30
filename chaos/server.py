"""PostgreSQL servers that can be stopped at any time, started again, copied and promoted."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import psycopg

# It already knows how to find PostgreSQL's programs, and how to run a server if this user is root.
from apoq.embedded import _gets_ready, _last_lines, _new_folder, _server_user, _usable, find_bindir

PATIENCE = 60.0
NOTHING: Mapping[str, str] = MappingProxyType({})
SETTINGS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
"""Otherwise, PostgreSQL's defaults."""

FEW_CONNECTIONS = 60
"""So few that a scenario can exhaust them."""

DEFAULT_CONNECTIONS = 100
"""PostgreSQL's default, for scenarios with more workers."""


class Skipped(Exception):
    """A scenario can't run on this machine; the message gives the reason."""


class Place:
    """A folder for servers, PostgreSQL's programs, and the user who runs them; removed after the block."""

    def __init__(self) -> None:
        self._user = _server_user()
        self.folder = _new_folder(self._user)
        self._stack = ExitStack()
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.programs = _usable(find_bindir(), self.folder, self._user)
        except BaseException:
            self._stack.close()
            raise
        self.give(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def give(self, path: Path) -> Path:
        """Make the servers' user the owner of a path."""
        if self._user:
            os.chown(path, self._user["user"], self._user["group"])
        return path

    def run(self, *command: str | Path) -> None:
        """Run a program and wait for its end."""
        done = subprocess.run(command, check=False, capture_output=True, timeout=PATIENCE, **self._options())
        if done.returncode:
            raise RuntimeError(f"{Path(command[0]).name}: {_last_lines(done.stderr)}")

    def start(
        self, log: Path, *command: str | Path, ends_by: int, environment: Mapping[str, str] = NOTHING
    ) -> subprocess.Popen[bytes]:
        """Start a server process, which gets the signal `ends_by` when this program ends or is killed."""
        options = self._options()
        options["env"].update(environment)
        if sys.platform == "linux":
            options["preexec_fn"] = partial(ctypes.CDLL(None).prctl, 1, ends_by)  # PR_SET_PDEATHSIG
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, **options)
        self._stack.callback(end, process, ends_by)
        return process

    def _options(self) -> dict[str, Any]:
        environment = {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self.folder)}
        return {**self._user, "cwd": self.folder, "env": environment, "stdin": subprocess.DEVNULL}

    @contextmanager
    def small_disk(self, megabytes: int) -> Iterator[Path]:
        """Mount a file system of a given size."""
        folder = self.folder / "small"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "chaos", str(folder)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            raise Skipped("this user may not mount a small file system")
        try:
            yield self.give(folder)
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607


class Server:
    """One PostgreSQL server on a port of the loopback interface."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        environment: Mapping[str, str] = NOTHING,
        *,
        max_connections: int = FEW_CONNECTIONS,
    ) -> None:
        self._settings = {**SETTINGS, "max_connections": str(max_connections)}
        self._place = place
        self._data = folder
        self._environment = environment
        self._log = folder.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    def create(self) -> Self:
        """Create the data folder, and a role that isn't a superuser, like an application's."""
        choices = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        self._place.run(self._place.programs / "initdb", "-D", str(self._data), *choices)
        self.start()
        with self.admin() as admin:
            admin.execute("CREATE ROLE app LOGIN")
        return self

    def create_as_standby(self, primary: Server) -> Self:
        """Create the data folder as a copy of the primary's, and follow it synchronously."""
        synchronous = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
        source = f"host=127.0.0.1 port={primary.port} user=postgres"
        choices = ["-d", source, "-D", str(self._data), "-R", "-X", "stream", "-c", "fast", "--no-sync"]
        self._place.run(self._place.programs / "pg_basebackup", *choices)
        self.start()
        primary.set("synchronous_standby_names", "*")
        with primary.admin() as admin:
            until(lambda: bool(admin.execute(synchronous).fetchone()))
        return self

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        status = self._data / "postmaster.pid"
        status.unlink(missing_ok=True)  # the file of a dead server may say that it is ready
        words = [word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")]
        program = self._place.programs / "postgres"
        command: list[str | Path] = [program, "-D", self._data, "-p", str(self.port), *words]
        self._process = self._place.start(
            self._log, *command, ends_by=signal.SIGINT, environment=self._environment
        )
        if not _gets_ready(self._process, status):
            raise RuntimeError(f"the server didn't start: {_last_lines(self._log.read_bytes())}")

    def stop(self, how: int = signal.SIGINT) -> None:
        """Stop the server: fast by SIGINT, immediately by SIGQUIT."""
        assert self._process is not None
        end(self._process, how)

    def set(self, name: str, value: str) -> None:
        """Change a setting of the running server."""
        with self.admin() as admin:
            admin.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            admin.execute("SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Promote a standby to primary."""
        with self.admin() as admin:
            admin.execute("SELECT pg_promote()")

    def url(self, database: str, port: int | None = None) -> str:
        """Return SQLAlchemy's URL of a database for the application's role; `port` may be that of a proxy."""
        return f"postgresql+psycopg://app@127.0.0.1:{port or self.port}/{database}"

    def admin(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """Connect as the superuser, for whom three connections are reserved."""
        return psycopg.connect(
            f"host=127.0.0.1 port={self.port} user=postgres dbname={database} connect_timeout=2",
            autocommit=True,
        )


def end(process: subprocess.Popen[bytes], how: int) -> None:
    """End a running process by a signal, or by SIGKILL if that isn't enough."""
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition has not become true in {seconds:g} s")
        time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


def fill(path: Path) -> None:
    """Write to a file until the disk is full."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(65_536))
