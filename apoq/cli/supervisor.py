"""Several worker processes, and a supervisor that replaces those that crash or have reached a limit.

Each child runs the same command line, and is connected to the supervisor by a socket: see `lifeline`.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from operator import itemgetter
from typing import Final

from apoq.cli.child import Child
from apoq.cli.exits import BadUsage
from apoq.cli.status import STATUS_INTERVAL_SECONDS, Status, is_wanted
from apoq.cli.stopping import StopNotice, again_by
from apoq.cli.worker_process import WorkerProcess
from apoq.worker.settling.counters import WorkerStats

logger = logging.getLogger(__name__)

CHILD_POLL_SECONDS: Final = 0.5
STOPPING_CHILD_POLL_SECONDS: Final = 0.05
"""Seconds between two checks whether a child has ended: usually, and while they stop."""

KILL_MARGIN_SECONDS: Final = 2.75
"""Seconds that a child has to stop, in addition to its timeout, before it is killed.

A little more than it takes to end itself (`apoq.cli.ending`).
"""


class Supervisor:
    """Keeps a number of child processes running until a signal."""

    def __init__(self, command: list[str], count: int, *, timeout: float) -> None:
        self._command = command
        self._workers = [WorkerProcess(number, self._spawn) for number in range(1, count + 1)]
        self._timeout = timeout
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._stops_at: float | None = None
        self._has_started = False
        """Whether a worker has started, so that the command line is right."""
        self._has_given_up = False
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
        try:
            while (code := self._turn()) is None:
                for key, _ in self._selector.select(
                    CHILD_POLL_SECONDS if self._stops_at is None else STOPPING_CHILD_POLL_SECONDS
                ):
                    if key.data is None:
                        asleep.recv(4096)
                    else:
                        key.data.read()
            return code
        finally:
            self._kill()

    def wake(self) -> None:
        """Take a turn now. From any thread."""
        if self._awake is not None:
            with suppress(BlockingIOError):  # there is something to read already
                self._awake.send(b"\0")

    def _spawn(self, number: int, is_successor: bool) -> Child:
        return Child(self._command, number, self._selector, is_successor=is_successor)

    def _turn(self) -> int | None:
        """Do what has to be done now; return an exit code if the program is to end."""
        self._obey()
        self._has_started |= any(child.has_started for child in self._children())
        for worker in self._workers:
            for child, code in worker.reap():
                self._has_started |= child.has_started
                if self._stops_at is not None:
                    continue
                if not self._has_started:
                    return code if code >= 0 else 128 - code
                self._has_given_up |= not worker.replace(child, code)
        if self._has_given_up and self._stops_at is None:
            self._stop()
        if self._stops_at is not None:
            return self._stopping(self._stops_at)
        # A single one at first, so that a wrong command line causes only one error message.
        for worker in self._workers if self._has_started else self._workers[:1]:
            worker.start()
            worker.hand_over()
        self._start_successor()
        self._report()
        return None

    def _start_successor(self) -> None:
        """Start one successor at a time, so that they need the memory and the time of one process."""
        if not any(worker.successor for worker in self._workers):
            waiting = [
                (since, worker) for worker in self._workers if (since := worker.wants_successor_since())
            ]
            if waiting:
                min(waiting, key=itemgetter(0))[1].start_successor()

    def _children(self) -> Iterator[Child]:
        for worker in self._workers:
            yield from worker.children

    def _running(self) -> int:
        return sum(worker.stats.running for worker in self._workers)

    def _report(self) -> None:
        if self._notice is not None:
            self._notice.renew()
        if time.monotonic() - self._said_at > STATUS_INTERVAL_SECONDS:
            self._say()

    def _say(self) -> None:
        self._said_at = time.monotonic()
        if is_wanted():
            stats = [worker.stats for worker in self._workers]
            self._status.say(WorkerStats(*map(sum, zip(*stats, strict=True))))

    def _stopping(self, stops_at: float) -> int | None:
        if not any(self._children()):
            self._say()
            return int(self._has_given_up)
        if time.monotonic() < stops_at:
            self._report()
            return None
        logger.error("some worker processes have not stopped in time, and are killed")
        return 1

    def _obey(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if self._stops_at is not None:
                # The second one: end at once, as if the signal had not been caught.
                self._kill()
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
                os._exit(128 + number)  # the kernel ignores the default for PID 1
            self._stop()

    def _stop(self) -> None:
        self._stops_at = time.monotonic() + self._timeout + KILL_MARGIN_SECONDS
        for child in self._children():
            child.stop()
        if count := len(list(self._children())):
            logger.info("stopping %s", _processes(count))
        self._notice = StopNotice(self._timeout, self._running, ends_at_once=again_by())
        self._notice.begin()

    def _kill(self) -> None:
        for child in self._children():
            child.kill()


def _processes(count: int) -> str:
    return "1 worker process" if count == 1 else f"{count} worker processes"


def again() -> list[str]:
    """Return the command line that started this program."""
    return [sys.executable, *sys.orig_argv[1:]]


def check_platform(option: str) -> None:
    """Fail if processes can't be supervised on this system."""
    if os.name != "posix":
        raise BadUsage(f"{option} needs Linux, macOS or another POSIX system: start the workers yourself")
