"""Cuts connections on which the server has fallen silent, and asks it to end what was executed there.

A network that drops packets without a word ends no connection: who waits for an answer would wait for ever.
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
"""Seconds between two looks for answers that are overdue."""

MIN_CHECK_INTERVAL_SECONDS: Final = 0.01
"""The same, when one is about to be overdue."""

IDLE_SECONDS: Final = 5.0
"""Seconds without anything to watch after which the thread ends."""

CANCEL_TIMEOUT_SECONDS: Final = 5.0
"""Seconds in which a request to cancel a statement must have reached the server."""


class Stopped(psycopg.OperationalError):
    """The worker is stopping: it waits for no answer any more."""

    def __init__(self) -> None:
        super().__init__("the worker is stopping: apoq waits no longer for the server")


class Wait(NamedTuple):
    """A connection on which a thread waits for an answer."""

    deadline: float
    seconds: float
    owner: object
    cut: psycopg.OperationalError | None = None
    """Why it was cut."""


class Watchdog:
    """Knows who waits for an answer, and until when; a thread, while there are any, cuts what is overdue."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Any, Wait] = {}
        self._limits: WeakKeyDictionary[object, float] = WeakKeyDictionary()
        self._thread: threading.Thread | None = None
        self._has_warned = False

    @contextmanager
    def awaiting(self, connection: Any, seconds: float, owner: object) -> Iterator[None]:
        """Cut this connection after so many seconds of silence; the error then says so.

        The owner is whose limit holds, too (`limit`): the engine that the connection was made by.
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
        """Note that the server isn't silent: a part of its answer has arrived."""
        with self._lock:
            if (wait := self._waiting.get(connection)) is not None and wait.cut is None:
                deadline = self._deadline(wait.seconds, wait.owner)
                self._waiting[connection] = wait._replace(deadline=deadline)

    def limit(self, owner: object, at: float | None) -> None:
        """Wait for no answer on this owner's connections after `at`, by time.monotonic(); None: no limit.

        What waits then is cut, and what would be sent after it fails.
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
        """Cut all connections of this owner on which a thread waits: its lease has ended."""
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
        """Leave this connection alone, for the answer is there or never will be; return why it was cut."""
        # With the lock, for after it the connection may be closed, and its number another's.
        with self._lock:
            wait = self._waiting.pop(connection, None)
        return None if wait is None else wait.cut

    def _deadline(self, seconds: float, owner: object) -> float:
        return min(time.monotonic() + seconds, self._limits.get(owner, math.inf))

    def _is_over(self, owner: object) -> bool:
        return self._limits.get(owner, math.inf) <= time.monotonic()

    def _cut(self, connection: Any, why: str | None) -> None:
        wait = self._waiting[connection]
        if wait.cut is None:  # once is enough
            error = psycopg.OperationalError(f"{why}: apoq has cut the connection") if why else Stopped()
            self._waiting[connection] = wait._replace(deadline=math.inf, cut=error)
            cut(connection)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="apoq-watch", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # The statement is executed unwatched; the next one tries again to start the thread.
            if not self._has_warned and not is_ending():
                self._has_warned = True
                logger.warning(
                    "no thread could be started to watch for connections on which the server has fallen "
                    "silent: %s; until one can be, a statement on such a connection waits for ever",
                    error,
                )
        else:
            self._thread = thread

    def cut_overdue(self) -> None:
        """Cut the connections on which an answer is overdue."""
        now = time.monotonic()
        with self._lock:
            for connection, wait in self._waiting.items():
                if wait.deadline <= now:
                    silence = f"the server has not answered for {wait.seconds:g} s"
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
    """Tell whether the program ends: from then on, Python 3.12 and later start no thread."""
    return not threading.main_thread().is_alive()


def cut(connection: Any) -> None:
    """End a psycopg connection, from any thread; who waits for its server's answer gets an error.

    What the server executes for it is cancelled: otherwise it would go on, such as wait for a lock, and each
    new try would add a session that waits beside it.
    """
    # The request is made first, from the connection's address and key: after the cut, it may be closed.
    with suppress(psycopg.Error, RuntimeError):
        if request := _cancellation(connection.pgconn):
            threading.Thread(target=request, name="apoq-cancel", daemon=True).start()
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as its:
        its.shutdown(socket.SHUT_RDWR)


def _cancellation(pgconn: Any) -> Callable[[], None] | None:
    """Return what cancels a connection's statement, if there is one; it connects to the server, and waits."""
    if pgconn.transaction_status != pq.TransactionStatus.ACTIVE:
        return None
    if capabilities.has_cancel_safe():
        return partial(_cancel, pgconn.cancel_conn())
    # libpq before version 17 has no other way than to block. In psycopg's C implementation, that would stop
    # all threads: then the statement goes on until the server's own timeouts end it.
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
    # The thread is the parent's, and the lock may have been held.
    watch.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
