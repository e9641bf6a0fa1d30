"""Several worker processes, and a supervisor that restarts them.

Each child runs the same command line, and is connected to the supervisor by a socket. Through it, the child
reports its statistics, and the supervisor tells the child to stop. It doesn't use a signal for that, because
systemd and others send one to the children as well, and two signals end a worker at once. If the supervisor
has ended, in any way, the child finds the socket closed and stops. Each child is in a process group of
its own, so that Ctrl-C reaches only the supervisor.
"""

from __future__ import annotations

import atexit
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from apoq.cli.exits import BadUsage
from apoq.cli.status import STATUS_INTERVAL_SECONDS, Status, every, is_wanted
from apoq.cli.stopping import StopNotice, again_by
from apoq.worker import Worker
from apoq.worker.settling.counters import WorkerStats

logger = logging.getLogger(__name__)

VARIABLE: Final = "APOQ_SUPERVISOR_FD"
"""The environment variable with the file descriptor of the child's end of the socket."""

NUMBER_VARIABLE: Final = "APOQ_WORKER_NUMBER"
"""The environment variable with the child's number: 1 is the first."""

FIRST_BACKOFF_SECONDS: Final = 1.0
MAX_BACKOFF_SECONDS: Final = 30.0
STABLE_AFTER_SECONDS: Final = 60.0
"""Seconds that a child must have lived for its death not to count as one of a series."""

CHILD_POLL_SECONDS: Final = 0.5
STOPPING_CHILD_POLL_SECONDS: Final = 0.05
"""Seconds between two checks whether a child has ended: usually, and while they stop."""

REPORT_INTERVAL_SECONDS: Final = 1.0
KILL_MARGIN_SECONDS: Final = 2.75
"""Seconds that a child has to stop, in addition to its timeout, before it is killed.

A little more than it takes to end itself (`apoq.cli.ending`).
"""


class Child:
    """One of the child processes, and those that replace it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.starts_at: float | None = None
        """When a replacement starts."""
        self.stats = WorkerStats()
        self.is_ready = False
        self.process: subprocess.Popen[bytes] | None = None
        self._has_started = False
        """Whether the worker of this process has started, so that it may run tasks."""
        self._socket: socket.socket | None = None
        self._rest = b""
        self._before = WorkerStats()
        self._started_at = 0.0
        self._deaths = 0

    def start(self, command: list[str], selector: selectors.BaseSelector) -> None:
        """Start a process."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - it is the user's own command
                command,
                env={**os.environ, VARIABLE: str(theirs.fileno()), NUMBER_VARIABLE: str(self.number)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        self._socket.setblocking(False)
        selector.register(self._socket, selectors.EVENT_READ, self)
        self.starts_at, self._started_at, self._rest = None, time.monotonic(), b""
        self._has_started = False

    def stop(self) -> None:
        """Tell the process to stop."""
        if self._socket is not None:
            with suppress(ConnectionError):
                self._socket.send(b"stop")
        if self.process is not None and not self._has_started:
            # It may not read that for a while, such as while Python or the application is imported.
            self.process.terminate()

    def hear(self, selector: selectors.BaseSelector) -> None:
        """Read what the process has reported."""
        assert self._socket is not None
        try:
            read = self._socket.recv(65536)
        except BlockingIOError:
            return
        except ConnectionError:
            read = b""
        if not read:
            self._close(selector)
            return
        *lines, self._rest = (self._rest + read).split(b"\n")
        if lines:
            self.is_ready = self._has_started = True
            running, *counts = map(int, lines[-1].split())
            added = (count + more for count, more in zip(self._before[1:], counts, strict=True))
            self.stats = WorkerStats(running, *added)

    def reap(self, selector: selectors.BaseSelector) -> int | None:
        """Return the exit code if the process has ended; its tasks stay counted."""
        if self.process is None or self.process.poll() is None:
            return None
        if self._socket is not None:
            self.hear(selector)
        self._close(selector)
        code = self.process.returncode
        self.process = None
        self._before = self.stats = self.stats._replace(running=0)
        return code

    def _close(self, selector: selectors.BaseSelector) -> None:
        if self._socket is not None:
            selector.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def backoff(self) -> float:
        """Return the seconds until a replacement starts; they grow with each death in a row."""
        self._deaths = 0 if time.monotonic() - self._started_at > STABLE_AFTER_SECONDS else self._deaths
        pause = min(FIRST_BACKOFF_SECONDS * 2.0**self._deaths, MAX_BACKOFF_SECONDS)
        self._deaths += 1
        self.starts_at = time.monotonic() + pause
        return pause


class Supervisor:
    """Keeps a number of child processes running until a signal."""

    def __init__(self, command: list[str], count: int, *, timeout: float) -> None:
        self._command = command
        self._children = [Child(number) for number in range(1, count + 1)]
        self._timeout = timeout
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._stops_at: float | None = None
        self._status = Status()
        self._said_at = time.monotonic()
        self._notice: StopNotice | None = None
        self._awake: socket.socket | None = None
        """Has something to read written to it if the next turn must be taken now."""

    def run(self) -> int:
        """Start the children, replace those that die, stop them at a signal; return an exit code."""
        self._awake, asleep = socket.socketpair()
        self._awake.setblocking(False)
        asleep.setblocking(False)
        self._selector.register(asleep, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._awake.fileno())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _frame: self._signals.append(number))
        # A single one at first, so that a wrong command line causes only one error message.
        self._children[0].start(self._command, self._selector)
        try:
            while (code := self._turn()) is None:
                for key, _ in self._selector.select(
                    CHILD_POLL_SECONDS if self._stops_at is None else STOPPING_CHILD_POLL_SECONDS
                ):
                    if key.data is None:
                        asleep.recv(4096)
                    else:
                        key.data.hear(self._selector)
            return code
        finally:
            self._kill()

    def wake(self) -> None:
        """Take a turn now. From any thread."""
        if self._awake is not None:
            with suppress(BlockingIOError):  # there is something to read already
                self._awake.send(b"\0")

    def _turn(self) -> int | None:
        """Do what has to be done now; return an exit code if the program is to end."""
        self._obey()
        for child in self._children:
            code = child.reap(self._selector)
            if code is None or self._stops_at is not None:
                continue
            if not self._children[0].is_ready:
                return code if code >= 0 else 128 - code
            logger.error(
                "worker process %d %s; another one starts in %g s",
                child.number,
                ended_how(code),
                child.backoff(),
            )
        if self._stops_at is not None:
            return self._stopping(self._stops_at)
        if self._children[0].is_ready:
            self._start_due()
        self._report()
        return None

    def _running(self) -> int:
        return sum(child.stats.running for child in self._children)

    def _report(self) -> None:
        if self._notice is not None:
            self._notice.renew()
        if time.monotonic() - self._said_at > STATUS_INTERVAL_SECONDS:
            self._say()

    def _say(self) -> None:
        self._said_at = time.monotonic()
        if is_wanted():
            stats = [child.stats for child in self._children]
            self._status.say(WorkerStats(*map(sum, zip(*stats, strict=True))))

    def _stopping(self, stops_at: float) -> int | None:
        if all(child.process is None for child in self._children):
            self._say()
            return 0
        if time.monotonic() < stops_at:
            self._report()
            return None
        logger.error("some worker processes have not stopped in time, and are killed")
        return 1

    def _start_due(self) -> None:
        for child in self._children:
            if child.process is None and (child.starts_at or 0.0) <= time.monotonic():
                child.start(self._command, self._selector)

    def _obey(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if self._stops_at is not None:
                # The second one: end at once, as if the signal had not been caught.
                self._kill()
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
                os._exit(128 + number)  # the kernel ignores the default for PID 1
            self._stops_at = time.monotonic() + self._timeout + KILL_MARGIN_SECONDS
            for child in self._children:
                child.stop()
            logger.info("stopping %s", _processes(len(self._children)))
            self._notice = StopNotice(self._timeout, self._running, ends_at_once=again_by())
            self._notice.begin()

    def _kill(self) -> None:
        for child in self._children:
            if child.process is not None:
                child.process.kill()
                child.process.wait()


def ended_how(code: int) -> str:
    """Describe an exit code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _processes(count: int) -> str:
    return "1 worker process" if count == 1 else f"{count} worker processes"


def again() -> list[str]:
    """Return the command line that started this program."""
    return [sys.executable, *sys.orig_argv[1:]]


def check_platform(option: str) -> None:
    """Fail if processes can't be supervised on this system."""
    if os.name != "posix":
        raise BadUsage(f"{option} needs Linux, macOS or another POSIX system: start the workers yourself")


def take_lifeline() -> socket.socket | None:
    """Return the child's end of the socket if this process is a supervisor's child; only once."""
    fd = os.environ.pop(VARIABLE, None)
    if fd is None:
        return None
    try:
        lifeline = socket.socket(fileno=int(fd))
    except (ValueError, OSError):
        raise BadUsage(
            f"the environment variable {VARIABLE} must be set only by `apoq worker` for its child processes, "
            f"got {fd!r}: unset it"
        ) from None
    lifeline.set_inheritable(False)
    return lifeline


def take_number() -> int:
    """Return the number of this process among a supervisor's children; 1 if it is none of them."""
    return int(os.environ.pop(NUMBER_VARIABLE, "1"))


def obey(lifeline: socket.socket, stop: Callable[[], None]) -> None:
    """Call `stop` when the supervisor says so or has ended; from now on, also while the worker starts."""

    def wait() -> None:
        told = b""
        with suppress(ConnectionError):
            told = lifeline.recv(64)
        if not told:
            logger.warning("the supervisor has ended: this worker stops, too")
        stop()

    threading.Thread(target=wait, name="apoq-lifeline", daemon=True).start()


def report(lifeline: socket.socket, worker: Worker) -> None:
    """Report a worker's statistics to the supervisor: now, every second, and at the end."""

    def send() -> None:
        with suppress(OSError):  # the supervisor has ended
            lifeline.send(b"%d %d %d %d %d\n" % worker.stats(), socket.MSG_DONTWAIT)

    send()
    atexit.register(send)  # the final numbers
    every(REPORT_INTERVAL_SECONDS, send)
