"""The socket between a supervisor and one of its child processes, from the child's side.

Through it, the child reports its statistics and asks for a successor, and the supervisor tells the child to
drain or to stop. It doesn't use a signal for that, because systemd and others send one to the children as
well, and two signals end a worker at once. If the supervisor has ended, in any way, the child finds the
socket closed and stops.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple, Self

from apoq.cli.exits import BadUsage
from apoq.cli.status import every
from apoq.worker import Worker
from apoq.worker.settling.counters import WorkerStats

logger = logging.getLogger(__name__)

VARIABLE: Final = "APOQ_SUPERVISOR_FD"
"""The environment variable with the file descriptor of the child's end of the socket."""

NUMBER_VARIABLE: Final = "APOQ_WORKER_NUMBER"
"""The environment variable with the child's number: 1 is the first."""

SUCCESSOR_VARIABLE: Final = "APOQ_IS_SUCCESSOR"
"""The environment variable that is "1" if another process with the same number still works."""

DRAIN, STOP = b"drain\n", b"stop\n"
"""The orders of the supervisor."""

REPORT_INTERVAL_SECONDS: Final = 1.0


class Report(NamedTuple):
    """The state of a child."""

    stats: WorkerStats
    is_ready: bool
    """Whether its worker is healthy, so that it may take over from its predecessor."""
    limit: str = ""
    """The last limit that it has reached, so that it should be replaced."""

    def encode(self) -> bytes:
        """Return it as a line."""
        return " ".join([*map(str, self.stats), str(int(self.is_ready)), self.limit]).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Self:
        """Read a line."""
        *numbers, is_ready, limit = line.decode().split(" ")
        return cls(WorkerStats(*map(int, numbers)), is_ready == "1", limit)


class Lifeline:
    """The connection of this process to the supervisor that has started it."""

    def __init__(self, connection: socket.socket, number: int, *, is_successor: bool) -> None:
        self.number = number
        """The number of this process among the supervisor's children: 1 is the first."""
        self.is_successor = is_successor
        """Whether another process with this number works until this one is ready."""
        self._socket = connection
        self._limit = ""
        self._report: Callable[[], None] = lambda: None

    @classmethod
    def take(cls) -> Self | None:
        """Return this process's own, if a supervisor has started it; only once."""
        fd = os.environ.pop(VARIABLE, None)
        if fd is None:
            return None
        is_successor = os.environ.pop(SUCCESSOR_VARIABLE, "") == "1"
        try:
            number = int(os.environ.pop(NUMBER_VARIABLE, "1"))
            connection = socket.socket(fileno=int(fd))
        except (ValueError, OSError):
            raise BadUsage(
                f"the environment variable {VARIABLE} must be set only by `apoq worker` for its child "
                f"processes, got {fd!r}: unset it"
            ) from None
        connection.set_inheritable(False)
        return cls(connection, number, is_successor=is_successor)

    def obey(self, *, drain: Callable[[], None], stop: Callable[[], None]) -> None:
        """Call these when the supervisor says so, from now on, also while the worker starts.

        `stop` is also called when the supervisor has ended.
        """

        def wait() -> None:
            told = b""
            while not told.endswith(STOP):
                try:
                    told += (read := self._socket.recv(64))
                except ConnectionError:
                    read = b""
                if not read:
                    logger.warning("the supervisor has ended: this worker stops, too")
                    break
                if told == DRAIN:
                    drain()
            stop()

        threading.Thread(target=wait, name="apoq-lifeline", daemon=True).start()

    def report(self, worker: Worker) -> None:
        """Report a worker's state to the supervisor: now, every second, and at the end."""

        def send() -> None:
            line = Report(worker.stats(), worker.is_healthy(), self._limit).encode()
            with suppress(OSError):  # the supervisor has ended
                self._socket.send(line, socket.MSG_DONTWAIT)

        self._report = send
        send()
        atexit.register(send)  # the final numbers
        every(REPORT_INTERVAL_SECONDS, send)

    def ask_for_successor(self, limit: str) -> None:
        """Ask to be replaced, because this process has reached a limit; each report repeats that."""
        self._limit = limit
        self._report()
