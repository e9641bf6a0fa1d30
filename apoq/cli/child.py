"""A child process of a supervisor, and the supervisor's end of the socket between them."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from apoq.cli.lifeline import DRAIN, NUMBER_VARIABLE, STOP, SUCCESSOR_VARIABLE, VARIABLE, Report
from apoq.worker.settling.counters import WorkerStats


class Child:
    """A process that runs the command line again, in a process group of its own.

    So Ctrl-C reaches only the supervisor.
    """

    def __init__(
        self,
        command: Sequence[str],
        number: int,
        selector: selectors.BaseSelector,
        *,
        is_successor: bool = False,
    ) -> None:
        """Start the process, and let `selector` wait for its reports; OSError if it can't be started."""
        self.stats = WorkerStats()
        self.has_started = False
        """Whether its worker has started, so that it may run tasks."""
        self.is_ready = False
        """Whether its worker is healthy."""
        self.limit = ""
        """The last limit that it has reached; empty if none."""
        self.ready_after = self.reached_after = 0.0
        """Seconds after its start at which its worker was healthy, and at which it has reached the limit."""
        self.attempts_then = 0
        """How many attempts had ended when it reached the limit."""
        self.started_at = time.monotonic()
        self._selector = selector
        self._rest = b""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = subprocess.Popen(  # noqa: S603 - it is the user's own command
                    command,
                    env={
                        **os.environ,
                        VARIABLE: str(theirs.fileno()),
                        NUMBER_VARIABLE: str(number),
                        SUCCESSOR_VARIABLE: str(int(is_successor)),
                    },
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                )
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        self._socket: socket.socket | None = ours
        selector.register(ours, selectors.EVENT_READ, self)

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.started_at

    def drain(self) -> None:
        """Tell it to claim no more tasks, and to end when its running ones have ended."""
        self._tell(DRAIN)

    def stop(self) -> None:
        """Tell it to stop, within the timeout of the command line."""
        self._tell(STOP)
        if not self.has_started:
            # It may not read that for a while, such as while Python or the application is imported.
            self.process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        self._close()

    def read(self) -> None:
        """Read its reports."""
        if self._socket is None:
            return
        try:
            read = self._socket.recv(65536)
        except BlockingIOError:
            return
        except ConnectionError:
            read = b""
        if not read:
            self._close()
            return
        *lines, self._rest = (self._rest + read).split(b"\n")
        if lines:
            report = Report.decode(lines[-1])
            self.has_started = True
            self.stats, self.is_ready = report.stats, report.is_ready
            if report.is_ready and not self.ready_after:
                self.ready_after = self.age
            if report.limit != self.limit:
                self.limit, self.reached_after = report.limit, self.age
                self.attempts_then = sum(report.stats[1:])

    def reap(self) -> int | None:
        """Return the exit code if it has ended; its last numbers are read before."""
        if self.process.poll() is None:
            return None
        self.read()
        self._close()
        self.stats = self.stats._replace(running=0)
        return self.process.returncode

    def _tell(self, order: bytes) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it has just ended
                self._socket.send(order)

    def _close(self) -> None:
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None


def ended_how(code: int) -> str:
    """Describe an exit code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
