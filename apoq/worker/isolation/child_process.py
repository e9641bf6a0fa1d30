"""A child process, as its worker sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.spawn import get_executable
from typing import Final

from apoq.core.outcomes import ProcessDied
from apoq.worker.isolation import messages
from apoq.worker.isolation.messages import FromChild, Setup, ToChild

_PROGRAM: Final = (
    "import json, sys; from multiprocessing.connection import Connection; "
    "parent = Connection(int(sys.argv[1])); sys.path[:] = json.loads(parent.recv_bytes()); "
    "from apoq.worker.isolation.child import main; main(parent, int(sys.argv[2]))"
)

EXIT_SECONDS: Final = 2.0
"""Seconds in which a child without a task has to exit before it is killed."""


class ChildProcess:
    """A process that was started for isolated tasks, and the connection to it.

    It is a new interpreter, not a fork: forks of a program with threads, TLS and database connections fail in
    many ways. It has no other open files of this process than standard output and error. It is in a process
    group of its own, so that Ctrl-C reaches only the worker.
    """

    def __init__(self, setup: Setup) -> None:
        """Start it; OSError if the system allows no more processes."""
        self._connection, theirs = Pipe()
        lifeline, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter
                [*_command(), str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline),
                process_group=0,
            )
        except BaseException:
            self._connection.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        self.has_run = False
        """Whether it has run an attempt."""
        with suppress(OSError):  # it has died already, which the first attempt detects
            path = [entry for entry in sys.path if isinstance(entry, str)]
            self._connection.send_bytes(json.dumps(path).encode())
            self.send(setup)

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def send(self, message: ToChild) -> None:
        """Send a message; OSError if it has died."""
        messages.send(self._connection, message)

    def receive(self, timeout: float) -> FromChild | None:
        """Return its next message, or None after `timeout`; EOFError or OSError if it has died."""
        found = messages.receive(self._connection, timeout)
        if found is None and not self.is_alive and not self._connection.poll():
            raise EOFError  # a process that it has started holds the connection open
        return found

    def kill(self) -> None:
        """Kill it and the processes that it has started, from any thread; `close` must be called as well."""
        with suppress(ProcessLookupError, PermissionError):  # it has ended
            os.killpg(self._process.pid, signal.SIGKILL)

    def hang_up(self) -> None:
        """Let it exit by itself; `close` must be called as well."""
        self._connection.close()

    def close(self) -> ProcessDied:
        """Wait for its end, and kill it if that takes too long; return how it has ended."""
        self.hang_up()
        try:
            code = self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
            return ProcessDied("the process of the task has closed its connection to the worker")
        finally:
            os.close(self._lifeline)
        self.kill()  # processes that it has started, because the task may run again now
        return ProcessDied(_ended_how(code))


def _command() -> list[str]:
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    return [os.fsdecode(get_executable()), *flags, "-c", _PROGRAM]


def _ended_how(code: int) -> str:
    if code >= 0:
        return f"the process of the task ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ": the system does this when memory runs out" if -code == signal.SIGKILL else ""
    return f"the process of the task was killed by {name}{hint}"
