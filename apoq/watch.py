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
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import capabilities, generators, pq, waiting

logger = logging.getLogger(__name__)

LOOK: Final = 0.5
"""Seconds between two looks for answers that are overdue."""

LINGER: Final = 5.0
"""Seconds without anything to watch after which the thread ends."""

CANCEL_TIMEOUT: Final = 5.0
"""Seconds in which a request to cancel a statement must have reached the server."""


class Wait(NamedTuple):
    """Somebody waits for an answer."""

    deadline: float
    seconds: float
    owner: object


class Watch:
    """Knows who waits for an answer, and until when; a thread, while there are any, cuts what is overdue."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Any, Wait] = {}
        self._thread: threading.Thread | None = None
        self._has_warned = False

    def begin(self, connection: Any, seconds: float, owner: object = None) -> None:
        """Cut this connection after so many seconds of silence, unless `end` comes before."""
        with self._lock:
            self._waiting[connection] = Wait(time.monotonic() + seconds, seconds, owner)
            if self._thread is None:
                self._start()

    def note_progress(self, connection: Any) -> None:
        """Note that the server isn't silent: a part of its answer has arrived."""
        with self._lock:
            if (wait := self._waiting.get(connection)) is not None:
                deadline = time.monotonic() + wait.seconds
                self._waiting[connection] = wait._replace(deadline=deadline)

    def end(self, connection: Any) -> None:
        """Leave this connection alone: the answer is there, or never will be."""
        # With the lock, for after it the connection may be closed, and its number another's.
        with self._lock:
            del self._waiting[connection]

    def cut_all(self, owner: object) -> None:
        """Cut all connections of this owner on which somebody waits."""
        with self._lock:
            for connection, wait in self._waiting.items():
                if wait.owner is owner:
                    cut(connection)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="apoq-watch", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # The statement is executed unwatched; the next one tries again to start the thread.
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "no thread could be started to watch for connections on which the server has fallen "
                    "silent: %s; until one can be, a statement on such a connection waits for ever",
                    error,
                )
        else:
            self._thread = thread

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(LOOK)
            now = time.monotonic()
            with self._lock:
                if self._waiting:
                    last = now
                elif now - last > LINGER:
                    self._thread = None
                    return
                for connection, wait in self._waiting.items():
                    if wait.deadline < now:
                        self._waiting[connection] = wait._replace(deadline=math.inf)  # once is enough
                        cut(connection)


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
        waiting.wait_conn(generators.cancel(request), 0.1, CANCEL_TIMEOUT)


def _cancel_blocking(request: Any) -> None:
    with suppress(psycopg.Error):
        request.cancel()


watch = Watch()


def _after_fork() -> None:
    # The thread is the parent's, and the lock may have been held.
    watch.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
