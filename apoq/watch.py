"""Cuts connections on which the server has fallen silent.

A network that drops packets without a word ends no connection: who waits for an answer would wait for ever.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any, Final

import psycopg

LOOK: Final = 0.5
"""Seconds between two looks for answers that are overdue."""

LINGER: Final = 5.0
"""Seconds without anything to watch after which the thread ends."""


class Watch:
    """Knows who waits for an answer, and until when; a thread, while there are any, cuts what is overdue."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Any, tuple[float, object]] = {}
        self._thread: threading.Thread | None = None

    def begin(self, connection: Any, seconds: float, owner: object = None) -> None:
        """Cut this connection in so many seconds, unless `end` comes before."""
        with self._lock:
            self._waiting[connection] = (time.monotonic() + seconds, owner)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="apoq-watch", daemon=True)
                self._thread.start()

    def end(self, connection: Any) -> None:
        """Leave this connection alone: the answer is there, or never will be."""
        # With the lock, for after it the connection may be closed, and its number another's.
        with self._lock:
            del self._waiting[connection]

    def cut_all(self, owner: object) -> None:
        """Cut all connections of this owner on which somebody waits."""
        with self._lock:
            for connection, (_, its_owner) in self._waiting.items():
                if its_owner is owner:
                    cut(connection)

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
                for connection, (deadline, _) in self._waiting.items():
                    if deadline < now:
                        cut(connection)


def cut(connection: Any) -> None:
    """End a psycopg connection, from any thread; who waits for its server's answer gets an error."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as its:
        its.shutdown(socket.SHUT_RDWR)


watch = Watch()


def _after_fork() -> None:
    # The thread is the parent's, and the lock may have been held.
    watch.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
