"""Closes connections on which the server has fallen silent, and cancels their statements.

A network that silently drops packets doesn't end a connection: without this, a thread that waits for a
response would wait for ever.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import psycopg
from psycopg import capabilities, generators, pq, waiting

logger = logging.getLogger(__name__)

CHECK_INTERVAL_SECONDS: Final = 0.5
"""Seconds between two checks for overdue responses."""

MIN_CHECK_INTERVAL_SECONDS: Final = 0.01
"""The same if a response is about to be overdue."""

IDLE_SECONDS: Final = 5.0
"""Seconds after which the thread ends if there is nothing to watch."""

CANCEL_TIMEOUT_SECONDS: Final = 5.0
"""Seconds in which a request to cancel a statement must have reached the server."""


class Stopped(psycopg.OperationalError):
    """The worker is stopping and no longer waits for responses."""

    def __init__(self) -> None:
        super().__init__("the worker is stopping: apoq no longer waits for the server")


class Wait(NamedTuple):
    """A connection on which a thread waits for a response."""

    deadline: float
    seconds: float
    owner: object
    cut: psycopg.OperationalError | None = None
    """The reason for which the connection was closed."""


class Watchdog:
    """Keeps a deadline for each connection on which a thread waits for the server.

    While there are any, a thread closes the connections whose response is overdue.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Any, Wait] = {}
        self._limits: WeakKeyDictionary[object, float] = WeakKeyDictionary()
        self._thread: threading.Thread | None = None
        self._has_warned = False

    @contextmanager
    def awaiting(self, connection: Any, seconds: float, owner: object) -> Iterator[None]:
        """Close this connection if the server is silent for so many seconds; the error then says so.

        The owner is the engine that made the connection; its `limit` applies as well.
        """
        self._begin(connection, seconds, owner)
        try:
            yield
        except Exception as error:
            if why := self._end(connection):
                raise why from error
            raise
        finally:
            self._end(connection)

    def note_progress(self, connection: Any) -> None:
        """Restart the timeout of a connection: a part of the response has arrived."""
        with self._lock:
            if (wait := self._waiting.get(connection)) is not None and wait.cut is None:
                deadline = self._deadline(wait.seconds, wait.owner)
                self._waiting[connection] = wait._replace(deadline=deadline)

    def limit(self, owner: object, at: float | None) -> None:
        """Wait for no response on this owner's connections after `at` (time.monotonic()); None for no limit.

        Connections that wait at that time are closed, and later statements fail.
        """
        with self._lock:
            if at is None:
                self._limits.pop(owner, None)
                return
            self._limits[owner] = at
            for connection, wait in self._waiting.items():
                if wait.owner is owner:
                    self._waiting[connection] = wait._replace(deadline=min(wait.deadline, at))

    def cut_all(self, owner: object) -> None:
        """Close all connections of this owner on which a thread waits: the worker's lease has ended."""
        with self._lock:
            for connection, wait in self._waiting.items():
                if wait.owner is owner:
                    self._cut(connection, "the worker's lease has ended")

    def _begin(self, connection: Any, seconds: float, owner: object) -> None:
        with self._lock:
            if self._is_over(owner):
                raise Stopped
            self._waiting[connection] = Wait(self._deadline(seconds, owner), seconds, owner)
            if self._thread is None:
                self._start()

    def _end(self, connection: Any) -> psycopg.OperationalError | None:
        """Stop watching this connection; return the error if it was closed."""
        # With the lock, because afterwards the connection may be closed and its file descriptor reused.
        with self._lock:
            wait = self._waiting.pop(connection, None)
        return None if wait is None else wait.cut

    def _deadline(self, seconds: float, owner: object) -> float:
        return min(time.monotonic() + seconds, self._limits.get(owner, math.inf))

    def _is_over(self, owner: object) -> bool:
        return self._limits.get(owner, math.inf) <= time.monotonic()

    def _cut(self, connection: Any, why: str | None) -> None:
        wait = self._waiting[connection]
        if wait.cut is None:
            error = psycopg.OperationalError(f"{why}: apoq has closed the connection") if why else Stopped()
            self._waiting[connection] = wait._replace(deadline=math.inf, cut=error)
            cut(connection)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="apoq-watch", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # The statement is executed without being watched; the next one tries to start the thread again.
            if not self._has_warned and not is_ending():
                self._has_warned = True
                logger.warning(
                    "can't start the thread that closes connections on which the server has fallen silent: "
                    "%s; until it can be started, a statement on such a connection waits for ever",
                    error,
                )
        else:
            self._thread = thread

    def cut_overdue(self) -> None:
        """Close the connections whose response is overdue."""
        now = time.monotonic()
        with self._lock:
            for connection, wait in self._waiting.items():
                if wait.deadline <= now:
                    silence = f"the server has not responded for {wait.seconds:g} s"
                    self._cut(connection, None if self._is_over(wait.owner) else silence)

    def _run(self) -> None:
        last, pause = time.monotonic(), CHECK_INTERVAL_SECONDS
        while True:
            time.sleep(pause)
            now = time.monotonic()
            self.cut_overdue()
            with self._lock:
                if self._waiting:
                    last = now
                elif now - last > IDLE_SECONDS:
                    self._thread = None
                    return
                first = min((wait.deadline for wait in self._waiting.values()), default=math.inf)
                pause = max(MIN_CHECK_INTERVAL_SECONDS, min(CHECK_INTERVAL_SECONDS, first - now))


def is_ending() -> bool:
    """Return whether the program is ending; from then on, Python 3.12 and later can't start threads."""
    return not threading.main_thread().is_alive()


def cut(connection: Any) -> None:
    """Close a psycopg connection from any thread; a thread that waits for its response gets an error.

    The statement on it is cancelled. Otherwise it would go on, for example to wait for a lock, and each retry
    would add another waiting session.
    """
    # The request is made first, because it needs the connection's address and key, which are gone once the
    # waiting thread has closed the connection.
    with suppress(psycopg.Error, RuntimeError):
        if request := _cancellation(connection.pgconn):
            threading.Thread(target=request, name="apoq-cancel", daemon=True).start()
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as its:
        its.shutdown(socket.SHUT_RDWR)


def _cancellation(pgconn: Any) -> Callable[[], None] | None:
    """Return a function that cancels the connection's statement, if it has one; it blocks on the network."""
    if pgconn.transaction_status != pq.TransactionStatus.ACTIVE:
        return None
    if capabilities.has_cancel_safe():
        return partial(_cancel, pgconn.cancel_conn())
    # Before version 17, libpq can only block. In psycopg's C implementation, that would block all threads, so
    # the statement goes on until one of the server's timeouts ends it.
    return partial(_cancel_blocking, pgconn.get_cancel()) if pq.__impl__ == "python" else None


def _cancel(request: Any) -> None:
    with suppress(psycopg.Error, OSError):
        request.start()
        waiting.wait_conn(generators.cancel(request), 0.1, CANCEL_TIMEOUT_SECONDS)


def _cancel_blocking(request: Any) -> None:
    with suppress(psycopg.Error):
        request.cancel()


watch = Watchdog()


def _after_fork() -> None:
    # The thread exists only in the parent, and the lock may have been held.
    watch.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
