"""Functions that child processes of workers import."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from opentelemetry import trace
from sqlalchemy import orm

from apoq import Cancel, Fail, Queue, Retry, RunningTask, Snooze, Worker

queue = Queue("isolated")

logger = logging.getLogger(__name__)

EVER = 3600.0


def pid(_task: RunningTask) -> int:
    return os.getpid()


def nothing(_task: RunningTask) -> None:
    pass


def write(task: RunningTask) -> None:
    task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})


def write_and_raise(task: RunningTask) -> None:
    write(task)
    raise ValueError("after the write")


def write_and_commit(task: RunningTask) -> None:
    write(task)
    task.session.commit()


def seen(task: RunningTask) -> dict[str, Any]:
    """Return what a processor sees."""
    return {
        "data": task.data,
        "type": task.type,
        "queue": task.queue,
        "attempt": task.attempt,
        "fail_count": task.fail_count,
        "priority": task.priority,
        "meta": task.meta,
        "created_at": task.created_at.isoformat(),
        "process_at": task.process_at.isoformat(),
        "claim_token": task.claim_token,
        "should_stop": task.should_stop,
    }


class Refused(Exception):
    """An error that can't be made from its message alone."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"refused: {reason} ({code})")


def refuse(task: RunningTask) -> None:
    try:
        raise Refused(7, reason="no")
    except Refused as error:
        if task.data == "refuse from":
            raise Retry(delay=60) from error
        raise


def outcome(task: RunningTask) -> None:
    match task.data:
        case "retry":
            raise Retry("later", delay=EVER)
        case "retry from":
            raise Retry(delay=EVER) from Refused(7, reason="no")
        case "fail":
            raise Fail("never")
        case "cancel":
            raise Cancel("not needed")
        case "snooze":
            raise Snooze(EVER)
        case "exit":
            sys.exit("out")


def result(task: RunningTask) -> Any:
    return task.data


def unstorable(_task: RunningTask) -> object:
    return object()


def parents(task: RunningTask) -> list[Any]:
    return list(task.parent_results)


def progress(task: RunningTask) -> None:
    task.set_progress(3, 4, "three")


def sleep(_task: RunningTask) -> None:
    time.sleep(EVER)


def sleep_briefly(task: RunningTask) -> None:
    time.sleep(task.data)


def sleep_in_the_server(task: RunningTask) -> None:
    task.session.execute(sa.text("SELECT pg_sleep(3600)"))


def count_in_c(_task: RunningTask) -> None:
    sum(range(10**15))  # it never gives up the interpreter's lock


def stubborn(_task: RunningTask) -> None:
    while True:
        try:
            time.sleep(EVER)
        except BaseException:
            continue


def clean_up(task: RunningTask) -> None:
    try:
        time.sleep(EVER)
    finally:
        Path(task.data).write_text("cleaned up")


def wait_until_it_should_stop(task: RunningTask) -> None:
    Path(task.data).touch()
    while not task.should_stop:
        time.sleep(0.01)
    raise Snooze(EVER)


def segfault(_task: RunningTask) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def read_null(_task: RunningTask) -> None:
    ctypes.string_at(0)


def kill(_task: RunningTask) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(_task: RunningTask) -> None:
    os._exit(3)


def run_out_of_memory(_task: RunningTask) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**31, limits[1]))
    try:
        bytearray(2**32)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def abort(_task: RunningTask) -> None:
    os.abort()


def touch_and_sleep(task: RunningTask) -> None:
    """Write the process's id to a file, and sleep."""
    _write_pid(task.data)
    time.sleep(EVER)


def touch_and_count(task: RunningTask) -> None:
    _write_pid(task.data)
    count_in_c(task)


def touch_and_fork(task: RunningTask) -> None:
    """Leave a process behind that has this one's files open, and die."""
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    Path(task.data).write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


def start_another(task: RunningTask) -> None:
    """Leave a program behind."""
    process = subprocess.Popen(["sleep", "600"])
    Path(task.data).write_text(str(process.pid))


def start_another_and_exit(task: RunningTask) -> None:
    start_another(task)
    os._exit(0)


def _write_pid(path: str) -> None:
    written = Path(f"{path}.part")
    written.write_text(str(os.getpid()))
    written.rename(path)


def open_files(_task: RunningTask) -> list[str]:
    """Return the files that this process has, besides standard input, output and error."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of this list
            if int(file.name) > 2:
                found.append(str(file.readlink()).partition(":")[0])
    return sorted(found)


def start_a_worker(task: RunningTask) -> None:
    Worker(task.session.get_bind()).start()


def is_running(pid: int) -> bool:
    """Return whether a process exists, and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def log(task: RunningTask) -> None:
    logger.debug("not wanted")
    logger.warning("task %d", task.id)
    try:
        raise Refused(7, reason="no")
    except Refused:
        logger.exception("refused")


def current_span(_task: RunningTask) -> list[str]:
    """Return the ids of the trace and the span in which a span of this process would be."""
    context = trace.get_current_span().get_span_context()
    return [f"{context.trace_id:032x}", f"{context.span_id:016x}"]


def place(_task: RunningTask) -> dict[str, Any]:
    return {
        "argv": Path("/proc/self/cmdline").read_text().replace("\0", " "),
        "environ": Path("/proc/self/environ").read_text().replace("\0", " "),
        "group": os.getpgid(0),
        "is_main": threading.current_thread() is threading.main_thread(),
    }


def survive_sigterm(_task: RunningTask) -> str:
    os.kill(os.getpid(), signal.SIGTERM)
    subprocess.run(["true"], check=True)
    return "survived"


def search_path(task: RunningTask) -> str:
    return task.session.scalar(sa.text("SHOW search_path"))


def application_name(task: RunningTask) -> str:
    return task.session.scalar(sa.text("SHOW application_name"))


def make_engine() -> sa.Engine:
    return sa.create_engine(
        os.environ["APOQ_TEST_URL"], connect_args={"application_name": "made in the child"}
    )


@contextmanager
def entered(task: RunningTask) -> Iterator[None]:
    """A middleware."""
    os.environ["APOQ_TEST_ENTERED"] = str(task.id)
    yield
    write(task)


def environment(_task: RunningTask) -> str | None:
    return os.environ.get("APOQ_TEST_ENTERED")


class Tasks:
    @staticmethod
    def double(task: RunningTask) -> int:
        return 2 * task.data

    def method(self, task: RunningTask) -> None:
        pass


def replaced(_task: RunningTask) -> None:
    pass


kept_replaced = replaced


def replaced(_task: RunningTask) -> None:
    pass


async def coroutine(_task: object) -> None:
    pass


@queue.task(isolated=True, keep_result=True)
def add_up(numbers: list[int], *, start: int = 0) -> int:
    return sum(numbers, start)


def die_at(task: RunningTask) -> None:
    """Write, and let this process be killed at a boundary, which is the task's data, in the first attempt."""
    if task.attempt == 1:
        prepare_to_die(task.session, task.data)
    if task.data == "before it asks":
        task.session.add(Row(task_id=task.id))
    else:
        write(task)


def prepare_to_die(session: orm.Session, boundary: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_at_the_completion(_connection, _cursor, statement: str, *_: object) -> None:
        if "UPDATE apoq_tasks" in statement or "DELETE FROM apoq_tasks" in statement:
            die()

    match boundary:
        case "before it writes":
            die()
        case "before it asks":
            sa.event.listen(session, "after_flush", die)
        case "before the completion":
            sa.event.listen(session.get_bind(), "before_cursor_execute", die_at_the_completion)
        case "before the commit":
            sa.event.listen(session, "before_commit", die)
        case "after the commit":
            sa.event.listen(session, "after_commit", die)


class Base(orm.DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "ledger"

    task_id: orm.Mapped[int] = orm.mapped_column(primary_key=True)


def write_slowly(task: RunningTask) -> None:
    time.sleep(0.01)
    write(task)
    time.sleep(0.01)


def sometimes_die(task: RunningTask) -> None:
    if task.data % 20 == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def touch(task: RunningTask) -> None:
    _write_pid(task.data)
