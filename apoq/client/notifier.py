"""Send notifications without blocking the caller."""

from __future__ import annotations

import logging
import math
import os
import selectors
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

import psycopg
from sqlalchemy import Engine
from sqlalchemy.engine import RootTransaction
from sqlalchemy.pool import PoolProxiedConnection

from apoq.core.pace import Pace
from apoq.postgres import fast_path
from apoq.postgres.connections import (
    ANSWER_TIMEOUT_SECONDS,
    execute,
    is_direct,
    own_engine,
    prepare_statement,
    renew,
)
from apoq.postgres.watchdog import is_ending
from apoq.schema.statements.notify import FLUSH_NOTHING, Notification, arrays, notify, notify_only

logger = logging.getLogger(__name__)

SEND_INTERVAL_SECONDS: Final = 0.002
"""Seconds between two notifications, at least, so that a burst of commits is few notifications."""

IDLE_SECONDS: Final = 5.0
"""Seconds without a notification after which the thread ends and its connection is closed."""

COMMIT_POLL_SECONDS: Final = 0.0005
"""Seconds between two checks whether a transaction has ended."""

COMMIT_WAIT_SECONDS: Final = 1.0
"""Longest time that a notification waits for the end of a transaction."""

MAX_NOTIFIERS: Final = 4
"""Number of notifiers in a process that have their own thread and connection; all others share a thread."""


class Threads:
    """The threads that send notifications in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[threading.Thread, Notifier] = {}
        self._sharers: deque[Notifier] = deque()
        self._is_shared = False
        """Whether the shared thread is running."""

    def serve(self, notifier: Notifier) -> None:
        """Run a notifier on a thread until it has nothing to send; RuntimeError if none can be started."""
        with self._lock:
            if len(self._owners) < MAX_NOTIFIERS:
                self._owners[_start_thread(self._run, notifier)] = notifier
                return
            if not self._is_shared:
                _start_thread(self._run_shared)
                self._is_shared = True
            self._sharers.append(notifier)

    def flush(self, timeout: float) -> None:
        """Wait until all notifications have been sent, for up to `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._is_sending() and time.monotonic() < deadline:
            time.sleep(COMMIT_POLL_SECONDS)

    def _is_sending(self) -> bool:
        with self._lock:
            return self._is_shared or any(notifier.is_sending for notifier in self._owners.values())

    def _run(self, notifier: Notifier) -> None:
        try:
            notifier.run()
        finally:
            with self._lock:
                del self._owners[threading.current_thread()]

    def _run_shared(self) -> None:
        while notifier := self._next():
            notifier.run_once()

    def _next(self) -> Notifier | None:
        with self._lock:
            self._is_shared = bool(self._sharers)
            return self._sharers.popleft() if self._sharers else None


def _start_thread(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, name="apoq-notifications", daemon=True)
    thread.start()
    return thread


threads = Threads()


class Notifier:
    """Sends the notifications of an engine, and of all engines that share its connection pool.

    It sends from the caller's thread if it can do so without waiting, and otherwise from another thread.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = own_engine(engine)
        self._lock = threading.Lock()
        self._pending: dict[Notification, RootTransaction | None] = {}
        self._is_served = False
        """Whether a thread sends the pending notifications."""
        self._has_warned = False
        self._connection = NotifyConnection(self._engine)
        self._sent_at = -math.inf
        self._pace = Pace()
        self._rested_at = 0.0
        wakeups: SimpleQueue[None] = SimpleQueue()
        self._wakeups = wakeups
        # The garbage collector may call this at any moment on any thread, so it must not take a lock.
        self._pool = weakref.ref(engine.pool, lambda _: wakeups.put(None))

    @property
    def is_sending(self) -> bool:
        """Whether a notification is still to be sent."""
        return bool(self._pending)

    def send(self, notification: Notification, transaction: RootTransaction | None = None) -> None:
        """Send a notification soon, without waiting; after the end of the transaction, if one is given."""
        with self._lock:
            # From this thread if possible, which is faster than waking up the other one.
            if transaction is None and not self._pending and self._connection.send(notification):
                return
            if self._is_served and not self._pending:
                self._wakeups.put(None)
            self._pending[notification] = transaction
            if not self._is_served:
                self._serve()

    def run(self) -> None:
        """Send notifications until there was none for `IDLE_SECONDS`, or the pool is garbage."""
        while not self._ended():
            if not self._pending:
                with suppress(Empty):
                    self._wakeups.get(timeout=IDLE_SECONDS)
                continue
            self._rest()
            self._send_pending()
            self._rest()
            with suppress(Exception):  # the next notification meets the same error
                self._connection.open()
        self._connection.close()
        self._engine.dispose()

    def _rest(self) -> None:
        """Let others commit, so that the next notification is for all of them."""
        sent_at = max(self._sent_at, self._connection.sent_at)
        until = max(self._rested_at, sent_at + SEND_INTERVAL_SECONDS)
        time.sleep(max(0.0, until - time.monotonic()))

    def run_once(self) -> None:
        """Send the pending notifications on a connection that is closed afterwards."""
        self._send_pending()
        self._engine.dispose()
        with self._lock:
            self._is_served = False
            if self._pending:
                self._serve()

    def _serve(self) -> None:
        try:
            threads.serve(self)
        except RuntimeError as error:
            # A program that is ending can't start threads; the workers find the task at their next poll.
            if not self._has_warned and not is_ending():
                self._has_warned = True
                logger.warning(
                    "can't start the thread that notifies the workers: they find new tasks at their next "
                    "poll, and the next commit tries again: %s",
                    error,
                )
            return
        if self._has_warned:
            self._has_warned = False
            logger.warning("started the thread that notifies the workers: new tasks are notified again")
        self._is_served = True

    def _ended(self) -> bool:
        with self._lock:
            is_idle = time.monotonic() - max(self._sent_at, self._connection.sent_at) >= IDLE_SECONDS
            if self._pending or not (is_idle or self._pool() is None):
                return False
            self._is_served = False
            return True

    def _send_pending(self) -> None:
        with self._lock:
            notifications = dict(self._pending)
        try:
            if not self._send_without_waiting(notifications):
                self._connection.close()
                self._send(notifications)
        except Exception as error:  # noqa: BLE001 - workers find the tasks at their next poll
            logger.debug("a notification could not be sent: %s", error)
        with self._lock:
            for notification, transaction in notifications.items():
                if self._pending.get(notification) is transaction:
                    del self._pending[notification]
            self._sent_at = time.monotonic()

    def _send_without_waiting(self, notifications: dict[Notification, RootTransaction | None]) -> bool:
        """Try to send without waiting, if it is a single notification; return whether it was sent."""
        if len(notifications) > 1:
            return False
        [(notification, transaction)] = notifications.items()
        return transaction is None and self._connection.send(notification)

    def _send(self, notifications: dict[Notification, RootTransaction | None]) -> None:
        deadline = time.monotonic() + COMMIT_WAIT_SECONDS
        waiting = dict(notifications)
        while waiting:
            is_over = time.monotonic() > deadline
            ready = [
                its for its, within in waiting.items() if is_over or within is None or not within.is_active
            ]
            if not ready:
                time.sleep(COMMIT_POLL_SECONDS)
                continue
            began = time.monotonic()
            execute(self._engine, notify(), arrays(ready))
            self._rested_at = began + self._pace.interval(time.monotonic() - began)
            for notification in ready:
                del waiting[notification]


class NotifyConnection:
    """A connection on which any thread can send a notification without waiting for the server's response."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._pooled: PoolProxiedConnection | None = None
        self._name = b""
        self.sent_at = -math.inf
        """Time of the last notification, by time.monotonic()."""

    def open(self) -> None:
        """Take a connection from the pool, unless it has one.

        Do nothing if the connection goes through a pooler such as PgBouncer.
        """
        if self._pooled is not None:
            return
        pooled = self._engine.raw_connection()
        if not is_direct(pooled):
            pooled.close()
            return
        try:
            execute(pooled, FLUSH_NOTHING, {})
            # Prepared, because planning would take a fifth of the time until a notification arrives.
            name = prepare_statement(pooled, notify_only())
        except BaseException as error:
            pooled.invalidate(error)
            raise
        with self._lock:
            self._pooled, self._name = pooled, name

    def send(self, notification: Notification) -> bool:
        """Send a notification. Return False if it is too soon after the last one, or before its response."""
        with self._lock:
            if self._pooled is None or time.monotonic() < self.sent_at + SEND_INTERVAL_SECONDS:
                return False
            connection: Any = self._pooled.driver_connection
            try:
                if not _is_answered(connection):
                    return False
                fast_path.send(connection, notify_only(), notification._asdict(), self._name)
            except psycopg.Error as error:
                self._drop(self._pooled, error)
                self._pooled = None
                return False
            self.sent_at = time.monotonic()
            return True

    def close(self) -> None:
        """Return the connection to the pool after the server's response to the last notification."""
        with self._lock:
            pooled, self._pooled = self._pooled, None
        if pooled is None:
            return
        connection: Any = pooled.driver_connection
        deadline = time.monotonic() + ANSWER_TIMEOUT_SECONDS
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(connection, selectors.EVENT_READ)
                while not _is_answered(connection):
                    # Not by the driver, which would hold the interpreter's lock while it waits.
                    if not selector.select(deadline - time.monotonic()):
                        raise psycopg.OperationalError("the server didn't respond to a notification in time")
        except psycopg.Error as error:
            self._drop(pooled, error)
        finally:
            pooled.close()

    def _drop(self, pooled: PoolProxiedConnection, error: Exception) -> None:
        pooled.invalidate(error)
        renew(self._engine)


def _is_answered(connection: psycopg.Connection[Any]) -> bool:
    """Return whether the server has responded to everything, without waiting; raise the server's error."""
    pgconn = connection.pgconn
    pgconn.consume_input()
    while not pgconn.is_busy():
        result = pgconn.get_result()
        if result is None:
            pgconn.consume_input()  # raises if the server has closed the connection
            return True
        fast_path.check(connection, result)
    return False


def _after_fork() -> None:
    # The threads run in the parent only. Their notifiers are kept, because closing the parent's sockets here
    # would end the parent's sessions.
    _inherited.append(dict(vars(threads)))
    threads.__init__()  # type: ignore[misc]


_inherited: list[object] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
