"""`apoq worker --max-tasks`, `--max-memory` and `--max-age`, with real processes and signals."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.orm import Session
from waiting import patience
from worker_programs import PATIENCE, Program, free_ports

from apoq import Queue, Task
from apoq.cli import main
from apoq.cli.child import Child
from apoq.cli.worker_process import WorkerProcess
from apoq.schema.tables import WorkerRow
from apoq.worker.settling.counters import WorkerStats

until = patience(PATIENCE)

APP = """
import os, time
from pathlib import Path
from apoq import Queue, Worker, database_url
import sqlalchemy

if Path("slow").exists():
    print("importing", os.getpid(), flush=True)
    while Path("slow").exists():
        time.sleep(0.01)

queue = Queue()
leaked = []

@queue.task(type="nap")
def nap() -> None:
    time.sleep(0.01)

@queue.task(type="hold")
def hold() -> None:
    print("holding", os.getpid(), flush=True)
    while not Path("go").exists():
        time.sleep(0.01)

@queue.task(type="leak")
def leak() -> None:
    leaked.append(b"x" * (10 * 2**20))
    time.sleep(0.01)

def limited():
    engine = sqlalchemy.create_engine(database_url(os.environ["DATABASE_URL"]))
    return Worker(engine, queue, max_tasks=5, concurrency=1)
"""

DRAINS = "is replaced by its successor, and drains"


@pytest.fixture
def start(url, tmp_path) -> Iterator[Callable[..., Program]]:
    (tmp_path / "app.py").write_text(APP)
    started = []

    def begin(*arguments: str, app: str = "app:queue") -> Program:
        started.append(Program(app, *arguments, cwd=tmp_path, url=url))
        return started[-1]

    yield begin
    for name in ("slow", "go"):
        with suppress(FileNotFoundError):
            (tmp_path / name).unlink()
    for program in started:
        program.kill()


@pytest.fixture
def add(engine) -> Callable[..., list[int]]:
    def commit(type_: str, number: int = 1) -> list[int]:
        with Session(engine) as session, session.begin():
            return [Queue().add(session, type_).id for _ in range(number)]

    return commit


@pytest.fixture
def states(engine) -> Callable[[str], dict[tuple[str, int], int]]:
    """Return a function that counts the tasks of a type by state and attempts."""

    def count(type_: str) -> dict[tuple[str, int], int]:
        query = sa.select(Task.state, Task.attempt, sa.func.count()).where(Task.type == type_)
        with engine.connect() as connection:
            rows = connection.execute(query.group_by(Task.state, Task.attempt))
            return {(state, attempt): number for state, attempt, number in rows}

    return count


@pytest.fixture
def pids(engine) -> Callable[[], set[int]]:
    """Return a function that returns the processes of the workers that have a row."""

    def find() -> set[int]:
        with engine.connect() as connection:
            return set(connection.scalars(sa.select(WorkerRow.pid)))

    return find


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def children(pid: int) -> dict[int, str]:
    """Return the states of a process's children, such as Z for a zombie."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError):
            found[int(child)] = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
    return found


def status(port: int, path: str) -> int | None:
    """Return the status of a page, or None if nothing responds."""
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.status
    except HTTPError as error:
        with error:
            return error.code
    except (OSError, HTTPException):
        return None


@pytest.mark.slow
class TestEachLimit:
    @pytest.mark.parametrize(
        ("options", "type_", "processes"),
        [
            (("--max-tasks", "25"), "nap", ()),
            (("--max-memory", "250M"), "leak", ()),
            (("--max-age", "2s"), "nap", ("--processes", "2")),
        ],
    )
    def test_processes_are_replaced_and_no_task_loses_an_attempt(
        self, start, add, states, options, type_, processes
    ):
        program = start(*options, *processes)
        program.wait_for("has started")
        for _ in range(2):  # the third time, a limit of memory that is reached so soon is given up
            add(type_, 40)
            program.wait_for(DRAINS)
        add(type_, 40)
        until(lambda: states(type_) == {("completed", 1): 120})

        assert program.stop() == 0
        assert "was killed" not in program.output
        assert "another one starts" not in program.output

    def test_the_successor_has_started_before_its_predecessor_claims_no_more(self, start, add):
        program = start("--max-tasks", "1")
        program.wait_for("has started")
        add("nap")

        program.wait_for("has reached its max_tasks after")
        program.wait_for("has started")
        program.wait_for(DRAINS)
        program.wait_for("claims no more tasks")
        program.wait_for("has stopped")
        assert program.stop() == 0

    def test_a_limit_of_the_worker_in_the_code_is_that_of_each_process(self, start, add, states):
        program = start("--processes", "1", app="app:limited")
        program.wait_for("has started")
        add("nap", 30)

        program.wait_for(DRAINS)
        until(lambda: states("nap") == {("completed", 1): 30})
        assert program.stop() == 0

    def test_without_a_supervisor_the_process_ends(self, start, add, states):
        add("nap", 100)
        program = start(app="app:limited")

        assert program.end() == 0
        program.wait_for("has reached its max_tasks")
        assert set(states("nap")) == {("completed", 1), ("pending", 0)}

    def test_a_burst_has_no_limits(self, start, add, states):
        add("nap", 30)
        program = start("--burst", app="app:limited")

        assert program.end() == 0
        assert states("nap") == {("completed", 1): 30}

    def test_a_limit_below_the_memory_at_the_start_is_an_error_and_not_a_loop(self, start, add, states):
        program = start("--max-memory", "10M")
        program.wait_for("max_memory must be much more than this process starts with, which is .* got 10 MB")
        add("leak", 20)

        until(lambda: states("leak") == {("completed", 1): 20})
        assert program.stop() == 0
        assert "successor" not in program.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-tasks", "0"), "not in the range x>=1"),
        (("--max-memory", "512"), "must be 1M or more, got 512 bytes: write 512M"),
        (("--max-memory", "big"), "must be a size, such as 512M or 2G, got 'big'"),
        (("--max-age", "soon"), "must be a length of time such as"),
        (("--max-tasks", "5", "--burst"), "--max-tasks and --burst can't be combined: leave out one of them"),
        (("--max-age", "6h", "--reload"), "--max-age and --reload can't be combined: leave out one of them"),
    ],
)
def test_a_wrong_limit_is_refused(options, message):
    done = CliRunner().invoke(main, ["worker", "app:queue", *options])

    assert (done.exit_code, message in done.output) == (2, True), done.output


@pytest.mark.slow
class TestWhileOneIsReplaced:
    @pytest.fixture
    def drains(self, start, add, pids) -> Callable[..., tuple[Program, int, int]]:
        """Start a program whose first process drains; return it, and the processes before and after."""

        def begin(*options: str) -> tuple[Program, int, int]:
            add("hold")
            program = start("--max-tasks", "1", "--concurrency", "2", *options)
            predecessor = int(program.wait_for("holding").split()[1])
            add("nap")
            program.wait_for(DRAINS)
            program.wait_for("claims no more tasks")
            (successor,) = pids() - {predecessor}
            return program, predecessor, successor

        return begin

    def test_a_long_task_holds_up_no_other(self, drains, add, states, tmp_path):
        program, predecessor, _ = drains()

        until(lambda: states("nap") == {("completed", 1): 1})
        assert states("hold") == {("running", 1): 1}
        (tmp_path / "go").touch()

        until(lambda: states("hold") == {("completed", 1): 1})
        until(lambda: predecessor not in children(program.pid))
        assert program.stop() == 0

    def test_a_signal_stops_both_in_time(self, drains, states):
        program, _, _ = drains("--timeout", "2")

        began = time.monotonic()
        assert program.stop() == 0, program.output
        assert time.monotonic() - began < 15
        assert states("hold") == {("pending", 0): 1}

    def test_the_predecessor_is_killed(self, drains, add, states, tmp_path):
        program, predecessor, _ = drains()

        os.kill(predecessor, signal.SIGKILL)

        program.wait_for("worker process 1, which was replaced, was killed by SIGKILL")
        (tmp_path / "go").touch()
        until(lambda: states("hold") == {("completed", 2): 1})  # another worker has rescued it
        assert program.stop() == 0

    def test_the_successor_is_killed(self, drains, add, states, tmp_path):
        program, _, successor = drains()

        os.kill(successor, signal.SIGKILL)

        program.wait_for("worker process 1 was killed by SIGKILL; another one starts in 1 s")
        program.wait_for("has started")
        (tmp_path / "go").touch()
        until(lambda: states("hold") == {("completed", 1): 1})
        assert program.stop() == 0


@pytest.mark.slow
class TestWhileASuccessorStarts:
    @pytest.fixture
    def starts(self, start, add, pids, tmp_path) -> Callable[..., tuple[Program, int, int]]:
        """Start a program whose successor is being imported; return it, and both processes."""

        def begin(*options: str) -> tuple[Program, int, int]:
            program = start("--max-tasks", "1", *options)
            program.wait_for("has started")
            (predecessor,) = pids()
            (tmp_path / "slow").touch()
            add("nap")
            return program, predecessor, int(program.wait_for("importing").split()[1])

        return begin

    def test_its_predecessor_works_on(self, starts, add, states, tmp_path):
        program, _, _ = starts()

        add("nap", 20)

        until(lambda: states("nap") == {("completed", 1): 21})
        (tmp_path / "slow").unlink()
        program.wait_for(DRAINS)
        assert program.stop() == 0

    def test_a_signal_stops_both(self, starts, states):
        program, predecessor, successor = starts()

        assert program.stop() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in (predecessor, successor))

    def test_its_predecessor_is_killed(self, starts, add, states, tmp_path):
        program, predecessor, _ = starts()

        os.kill(predecessor, signal.SIGKILL)

        program.wait_for("worker process 1 was killed by SIGKILL; its successor takes over")
        (tmp_path / "slow").unlink()
        program.wait_for("has started")
        add("hold")
        program.wait_for("holding")
        (tmp_path / "go").touch()
        assert program.stop() == 0

    def test_it_is_killed(self, starts, add, tmp_path):
        program, _, successor = starts()

        os.kill(successor, signal.SIGKILL)

        program.wait_for("the successor of worker process 1 was killed by SIGKILL before it was ready")
        (tmp_path / "slow").unlink()
        program.wait_for(DRAINS)
        assert program.stop() == 0

    def test_code_that_can_not_be_imported_takes_no_capacity(self, start, add, states, pids, tmp_path):
        program = start("--max-tasks", "1")
        program.wait_for("has started")
        predecessors = pids()
        (tmp_path / "app.py").write_text("import no_such_module")
        add("nap")
        program.wait_for("no_such_module")
        program.wait_for("successor of worker process 1 ended with code 2 .* the process goes on, .* in 1 s")
        program.wait_for("successor of worker process 1 ended with code 2 .* the process goes on, .* in 2 s")

        add("nap", 20)
        until(lambda: states("nap") == {("completed", 1): 21})
        assert pids() == predecessors
        (tmp_path / "app.py").write_text(APP)

        program.wait_for(DRAINS)
        assert program.stop() == 0


@pytest.mark.slow
class TestThePorts:
    def test_a_port_passes_to_the_successor(self, start, add, pids, tmp_path):
        port = free_ports(2)
        add("hold")
        program = start(
            "--max-tasks", "1", "--health-port", str(port), "--metrics-port", str(port), "--concurrency", "2"
        )
        program.wait_for("holding")
        until(lambda: status(port, "/ready") == 200)
        missing, over = [], threading.Event()

        def ask() -> None:
            began: float | None = None
            while not over.is_set():
                if status(port, "/live") is not None:
                    began = None
                else:
                    began = began or time.monotonic()
                    missing.append(time.monotonic() - began)

        asking = threading.Thread(target=ask)
        asking.start()
        add("nap")
        program.wait_for(DRAINS)
        program.wait_for(rf"/metrics and /live and /ready at http://127.0.0.1:{port}")
        over.set()
        asking.join(PATIENCE)

        assert len(pids()) == 2  # the predecessor still holds its task
        assert (status(port, "/ready"), status(port, "/metrics")) == (200, 200)
        assert max(missing, default=0.0) < 2.0
        (tmp_path / "go").touch()
        assert program.stop() == 0

    def test_each_of_several_keeps_its_own(self, start):
        first = free_ports(2)
        program = start("--processes", "2", "--max-age", "2s", "--health-port", str(first))
        for _ in range(3):
            program.wait_for(DRAINS)
            for port in (first, first + 1):
                until(lambda port=port: status(port, "/ready") == 200)
        assert program.stop() == 0
        assert "is in use" not in program.output


STAND_IN = """
import os, socket, sys
lifeline = socket.socket(fileno=int(os.environ["APOQ_SUPERVISOR_FD"]))
lifeline.send(sys.argv[1].encode() + b"\\n")
order = lifeline.recv(64)
sys.exit(int(sys.argv[2]) if order else 0)
"""
"""A child that reports this line at once, waits for an order, and ends with this code."""

SUPERVISE = """
import logging, sys
from apoq.cli import worker_process
from apoq.cli.supervisor import Supervisor
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
worker_process.FIRST_BACKOFF_SECONDS = 0.01
command = [sys.executable, "-S", "-c", sys.argv[1], *sys.argv[3:]]
sys.exit(Supervisor(command, int(sys.argv[2]), timeout=1).run())
"""


@pytest.mark.slow
class TestTheSupervisor:
    """With children that start quickly, because they aren't workers."""

    @pytest.fixture
    def supervise(self) -> Iterator[Callable[..., subprocess.Popen[str]]]:
        started = []

        def begin(report: str, *, processes: int = 1, code: int = 0, child: str = STAND_IN):
            command = [sys.executable, "-c", SUPERVISE, child, str(processes), report, str(code)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            return started[-1]

        yield begin
        for program in started:
            program.kill()
            program.wait()
            program.stdout.close()

    def test_fifty_replacements_leave_neither_zombies_nor_descriptors(self, supervise):
        program = supervise("0 100 0 0 0 1 max_tasks", processes=2)
        lines = iter(program.stdout)
        replaced = (line for line in lines if DRAINS in line)
        for _ in range(5):
            next(replaced)
        before = descriptors(program.pid)

        for _ in range(50):
            next(replaced)

        until(lambda: descriptors(program.pid) <= before + 2)  # two sockets more or less, at any moment
        until(lambda: len(children(program.pid)) <= 4 and "Z" not in children(program.pid).values())
        program.send_signal(signal.SIGTERM)
        for _ in lines:
            pass
        assert program.wait(PATIENCE) == 0

    @pytest.mark.parametrize("attempts", [1, 500])
    def test_a_limit_of_memory_that_leaves_no_time_to_work_is_given_up(self, supervise, attempts):
        program = supervise(f"0 {attempts} 0 0 0 1 max_memory")
        said = ""
        while "goes on without that limit" not in said:
            said += program.stdout.readline()

        assert said.count(DRAINS) == 2
        assert re.search(rf"max_memory after 0.\d s and {attempts} attempts, .* raise max_memory", said)
        program.send_signal(signal.SIGTERM)
        assert DRAINS not in program.stdout.read()

    def test_five_crashes_within_a_minute_end_the_program(self, supervise):
        program = supervise("0 0 0 0 0 1 ", child=STAND_IN.replace("order =", "sys.exit(3) #"))

        said = program.stdout.read()

        assert program.wait(PATIENCE) == 1
        assert said.count("worker process 1 ended with code 3; another one starts in") == 4
        assert re.search(
            r"1 ended with code 3; it has crashed 5 times within \d+ s, so the program ends", said
        )

    def test_the_numbers_of_a_process_and_its_successor_are_added(self):
        selector = selectors.DefaultSelector()
        command = [sys.executable, "-S", "-c", STAND_IN, "1 100 0 0 0 1 max_tasks", "0"]
        worker = WorkerProcess(
            1, lambda number, is_successor: Child(command, number, selector, is_successor=is_successor)
        )

        def turn() -> None:
            for key, _ in selector.select(0.1):
                key.data.read()
            list(worker.reap())

        worker.start()
        until(lambda: turn() or worker.child.is_ready)
        worker.start_successor()
        until(lambda: turn() or worker.successor.is_ready)
        assert worker.stats == WorkerStats(running=2, completed=200)

        worker.hand_over()

        until(lambda: turn() or not worker.predecessors)
        assert worker.stats == WorkerStats(running=1, completed=200)
        worker.child.stop()
        until(lambda: turn() or worker.child is None)
        assert worker.stats == WorkerStats(completed=200)

    def test_the_pauses_between_starts_double_up_to_half_a_minute(self, caplog):
        def fail(number: int, is_successor: bool) -> None:
            raise OSError("no more processes")

        worker = WorkerProcess(1, fail)
        for _ in range(7):
            worker.starts_at = 0.0
            worker.start()

        said = re.findall(r"can't be started: no more processes; it is tried again in (\d+) s", caplog.text)
        assert said == ["1", "2", "4", "8", "16", "30", "30"]
