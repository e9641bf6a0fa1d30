"""A worker's process ends in time once it is told to, whatever it does just then."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from proxy import Proxy
from sqlalchemy.orm import Session
from waiting import catches, patience

from apoq import Queue, Task

pytestmark = pytest.mark.slow

SOON = 30.0
OVERTIME = 3.0
"""Seconds after its `--timeout` in which a process must have ended."""

BUSY = 4.0
"""Seconds by which a machine that is busy with other tests may be late."""

TIMEOUT = 0.3
until = patience(SOON)

APP = """
import asyncio, atexit, multiprocessing, os, threading, time
from concurrent.futures import ThreadPoolExecutor
from apoq import Queue

queue = Queue()

def say(*words):
    print(*words, flush=True)

say("importing", os.getpid())
time.sleep(float(os.environ.get("IMPORT_TIME", "0")))

@queue.task(type="function")
def function() -> None:
    say("begun", os.getpid())
    time.sleep(60)

@queue.task(type="coroutine")
async def coroutine() -> None:
    say("begun", os.getpid())
    await asyncio.sleep(60)

@queue.task(type="blocking_coroutine")
async def blocking_coroutine() -> None:
    say("begun", os.getpid())
    time.sleep(60)

@queue.task(type="to_thread")
async def to_thread() -> None:
    await asyncio.to_thread(function)

@queue.task(type="run_in_executor")
async def run_in_executor() -> None:
    await asyncio.get_running_loop().run_in_executor(None, function)

@queue.task(type="own_executor")
def own_executor() -> None:
    ThreadPoolExecutor(thread_name_prefix="theirs").submit(function)

@queue.task(type="thread")
def thread() -> None:
    threading.Thread(target=function, name="theirs", daemon=False).start()

@queue.task(type="process")
def process() -> None:
    multiprocessing.get_context("fork").Process(target=function).start()

@queue.task(type="exit_handler")
def exit_handler() -> None:
    atexit.register(time.sleep, 60)
    say("begun", os.getpid())
"""


class Program:
    """`apoq worker`, and what it has printed."""

    def __init__(self, *command: str, cwd: Path, url: sa.URL, **environment: str) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "DATABASE_URL": url.render_as_string(hide_password=False), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for printed in self._process.stdout:
            self.output += printed

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_for(self, pattern: str, number: int = 1) -> None:
        until(lambda: len(re.findall(pattern, self.output)) >= number or self.has_ended())
        assert self._process.poll() is None, self.output

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.poll()

    def stop(self, number: int = signal.SIGTERM, pid: int | None = None) -> float:
        """Send a signal, wait for the end, and return the seconds that this took."""
        os.kill(pid or self.pid, number)
        sent = time.monotonic()
        self._process.wait(SOON)
        return time.monotonic() - sent

    def kill(self) -> None:
        for pid in re.findall(r"^(?:importing|begun) (\d+)$", self.output, re.MULTILINE):
            if int(pid) > 100:  # those of a namespace of its own end with that
                kill(int(pid))
        self._process.kill()
        self._process.wait()
        self._reader.join(SOON)
        self._process.stdout.close()


def kill(pid: int) -> None:
    """End a process of a test's, if it is still there."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"apoq" in command:
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


@pytest.fixture
def start(tmp_path, url) -> Iterator[Callable[..., Program]]:
    """Start the program on a test's application."""
    (tmp_path / "app.py").write_text(APP)
    started = []

    def begin(
        *options: str,
        at: sa.URL = url,
        inside: tuple[str, ...] = (),
        script: bool = False,
        **environment: str,
    ) -> Program:
        apoq = (str(Path(sys.executable).parent / "apoq"),) if script else (sys.executable, "-m", "apoq")
        command = (*inside, *apoq, "worker", "app:queue", "--timeout", str(TIMEOUT), *options)
        started.append(Program(*command, cwd=tmp_path, url=at, **environment))
        return started[-1]

    yield begin
    for program in started:
        program.kill()


@pytest.fixture
def add(engine) -> Callable[..., int]:
    def commit(type_: str) -> int:
        with Session(engine) as session, session.begin():
            return Queue().add(session, type_).id

    return commit


@pytest.fixture
def proxy(url) -> Iterator[Proxy]:
    proxy = Proxy(url)
    yield proxy
    proxy.close()


def load(engine, task_id: int) -> Task:
    with Session(engine) as session:
        return session.get(Task, task_id)


def is_in_time(seconds: float) -> bool:
    return seconds < TIMEOUT + OVERTIME + BUSY


ONE: tuple[str, ...] = ()
TWO = ("--processes", "2")


NUMBERS = ["one process", "two processes"]


class TestInTime:
    @pytest.mark.parametrize("processes", [ONE, TWO], ids=NUMBERS)
    def test_with_nothing_to_do(self, start, processes):
        program = start(*processes)
        program.wait_for("has started", len(processes) or 1)

        assert is_in_time(program.stop())
        assert program.code == 0

    @pytest.mark.parametrize(
        "type_", ["function", "coroutine", "blocking_coroutine", "to_thread", "run_in_executor"]
    )
    def test_with_a_task_that_goes_on(self, start, add, engine, type_):
        id_ = add(type_)
        program = start()
        program.wait_for("begun")

        assert is_in_time(program.stop())
        assert program.code == 0, program.output
        assert (load(engine, id_).state, load(engine, id_).attempt) == ("pending", 0)
        assert "is ended" not in program.output

    @pytest.mark.parametrize(
        ("type_", "processes"),
        [("own_executor", ONE), ("thread", ONE), ("thread", TWO), ("process", ONE), ("exit_handler", ONE)],
    )
    def test_with_what_a_task_has_left_behind(self, start, add, engine, type_, processes):
        id_ = add(type_)
        program = start(*processes)
        program.wait_for("begun")
        until(lambda: load(engine, id_).state == "completed")

        assert is_in_time(program.stop())
        assert program.code == 0, program.output
        assert "something in its process still runs" in program.output
        if type_ in {"own_executor", "thread"}:
            assert "theirs" in program.output

    @pytest.mark.parametrize(
        ("database", "type_", "processes"),
        [
            ("silent", None, ONE),
            ("silent", "function", ONE),
            ("silent", "function", TWO),
            ("away", None, ONE),
            ("away", "function", ONE),
        ],
    )
    def test_without_its_database(self, start, add, proxy, database, type_, processes):
        if type_:
            add(type_)
        program = start(*processes, at=proxy.url)
        program.wait_for("begun" if type_ else "has started")
        if database == "silent":
            proxy.cut()
        else:
            proxy.close()
            program.wait_for("the database is away")

        assert is_in_time(program.stop())
        assert "server closed the connection" not in program.output or database == "away"

    @pytest.mark.parametrize("processes", [ONE, TWO], ids=NUMBERS)
    def test_while_it_imports_and_then_begins_nothing(self, start, add, processes):
        add("function")
        program = start(*processes, "--timeout", "60", IMPORT_TIME="2")
        program.wait_for("importing")

        assert is_in_time(program.stop())
        assert "begun" not in program.output

    @pytest.mark.parametrize("processes", [ONE, TWO], ids=NUMBERS)
    def test_while_it_starts_on_a_database_that_is_silent(self, start, url, processes):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            program = start(*processes, at=url.set(host="127.0.0.1", port=silent.getsockname()[1], query={}))
            client, _ = silent.accept()
            with client:
                assert is_in_time(program.stop())


NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def can_be_pid_1() -> bool:
    """Tell whether a process can be PID 1 here, of a namespace of its own, as in a container."""
    return bool(shutil.which("unshare")) and subprocess.run([*NAMESPACE, "true"], check=False).returncode == 0


@pytest.mark.skipif(not can_be_pid_1(), reason="needs the right to make a PID namespace")
class TestAsPID1:
    @pytest.fixture
    def start(self, start) -> Callable[..., tuple[Program, int]]:
        """Start it, and return its PID here, too."""

        def begin(*arguments: str, **options: Any) -> tuple[Program, int]:
            program = start(*arguments, inside=NAMESPACE, **options)
            children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
            until(children.read_text)
            return program, int(children.read_text())

        return begin

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
    def test_a_signal_ends_it_while_it_imports(self, start, number):
        program, pid = start(IMPORT_TIME="60")
        program.wait_for("importing")

        assert is_in_time(program.stop(number, pid))
        assert program.code == (1 if number == signal.SIGINT else 128 + number)

    def test_a_signal_ends_it_before_that(self, start):
        program, pid = start(IMPORT_TIME="60", script=True)
        until(lambda: catches(pid, signal.SIGTERM) or program.has_ended())

        assert is_in_time(program.stop(signal.SIGTERM, pid))
        assert program.code == 128 + signal.SIGTERM

    @pytest.mark.parametrize("processes", [ONE, TWO], ids=NUMBERS)
    def test_a_signal_stops_it_and_a_second_one_ends_it(self, start, add, processes):
        add("function")
        program, pid = start("--timeout", "60", *processes)
        program.wait_for("begun")

        def signalled() -> bool:
            # More often than once, because two that are sent at the same time are one.
            with suppress(ProcessLookupError):  # it ends before the program that it runs in
                os.kill(pid, signal.SIGTERM)
            return program.has_ended()

        until(signalled, TIMEOUT + OVERTIME + BUSY)

        assert program.code == 128 + signal.SIGTERM

    @pytest.mark.parametrize("processes", [ONE, TWO], ids=NUMBERS)
    def test_it_stops_in_time(self, start, processes):
        program, pid = start(*processes)
        program.wait_for("has started")

        assert is_in_time(program.stop(signal.SIGTERM, pid))
        assert program.code == 0


def test_a_program_that_goes_on_after_the_command_is_left_alone(tmp_path, url):
    """Such as a test of the command line."""
    (tmp_path / "app.py").write_text(APP)
    program = """
        import os, signal, threading, time
        from apoq.cli import main
        timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        main(["worker", "app:queue", "--timeout", "0.3"], standalone_mode=False)
        time.sleep(4)
        raise SystemExit(7)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**os.environ, "DATABASE_URL": url.render_as_string(hide_password=False)},
        capture_output=True,
        text=True,
        check=False,
        timeout=SOON,
    )

    assert "has stopped" in done.stderr
    assert done.returncode == 7
