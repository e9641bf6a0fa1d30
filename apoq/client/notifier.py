"""Sends notifications, without keeping anybody waiting."""

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
from apoq.schema.statements.notify import FLUSH_NOTHING, Notification, notify, notify_only

logger = logging.getLogger(__name__)

IDLE_SECONDS: Final = 5.0
"""Seconds without a notification after which the thread ends and its connection is closed."""

REST_FACTOR: Final = 20
"""How many times as long as a round took the thread rests after it, because others want to commit."""

MAX_REST_SECONDS: Final = 0.02
"""Seconds by which a notification is late at most, after another."""

SEND_INTERVAL_SECONDS: Final = 0.005
"""Seconds between two notifications that are sent at once."""

COMMIT_POLL_SECONDS: Final = 0.0005
"""Seconds between two looks whether a commit has come through."""

COMMIT_WAIT_SECONDS: Final = 1.0
"""Seconds for which a notification waits for a commit to come through."""

MAX_NOTIFIERS: Final = 4
"""Pools of a process whose notifications have a thread and a connection of their own at one time."""


class Threads:
    """The threads that send notifications in this process: some notifiers have one each, others share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[threading.Thread, Notifier] = {}
        self._sharers: deque[Notifier] = deque()
        self._is_shared = False
        """Whether the thread that they share is running."""

    def serve(self, notifier: Notifier) -> None:
        """Run a notifier on a thread, until it has nothing to send; RuntimeError if none can be started."""
        with self._lock:
            if len(self._owners) < MAX_NOTIFIERS:
                self._owners[_start_thread(self._run, notifier)] = notifier
                return
            if not self._is_shared:
                _start_thread(self._run_shared)
                self._is_shared = True
            self._sharers.append(notifier)

    def flush(self, timeout: float) -> None:
        """Wait until all notifications have been sent."""
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
    """Sends the notifications of an engine and all others that share its connection pool.

    While there are few, from the caller's thread; else, from another.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = own_engine(engine)
        self._lock = threading.Lock()
        self._pending: dict[Notification, RootTransaction | None] = {}
        self._is_served = False
        """Whether a thread sends what is pending."""
        self._has_warned = False
        self._line = NotifyConnection(self._engine)
        self._sent_at = -math.inf
        wakeups: SimpleQueue[None] = SimpleQueue()
        self._wakeups = wakeups
        # The garbage collector may call this at any moment of any thread: only what takes no lock is safe.
        self._pool = weakref.ref(engine.pool, lambda _: wakeups.put(None))

    @property
    def is_sending(self) -> bool:
        """Whether something is still to be sent."""
        return bool(self._pending)

    def send(self, notification: Notification, transaction: RootTransaction | None = None) -> None:
        """Send a notification soon: when the transaction is over, if one is given. Never waits."""
        with self._lock:
            if transaction is None and not self._pending and self._line.send(notification):
                return  # a thread would have to wake up first
            if self._is_served and not self._pending:
                self._wakeups.put(None)
            self._pending[notification] = transaction
            if not self._is_served:
                self._serve()

    def run(self) -> None:
        """Send what comes, on one connection, until nothing has come for a while or the pool is gone."""
        while not self._ended():
            if not self._pending:
                with suppress(Empty):
                    self._wakeups.get(timeout=IDLE_SECONDS)
                continue
            began = time.monotonic()
            self._send_pending()
            time.sleep(min(MAX_REST_SECONDS, REST_FACTOR * (time.monotonic() - began)))
            with suppress(Exception):  # the next one finds out
                self._line.open()
        self._line.close()
        self._engine.dispose()

    def run_once(self) -> None:
        """Send what is pending, on a connection that is closed afterwards."""
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
            # At the end of the program, none can be: the workers find the task when they look by themselves.
            if not self._has_warned and not is_ending():
                self._has_warned = True
                logger.warning(
                    "no thread can be started to notify the workers, which find tasks when they look by "
                    "themselves; the next commit tries again: %s",
                    error,
                )
            return
        if self._has_warned:
            self._has_warned = False
            logger.warning("the thread that notifies the workers could be started: they are notified again")
        self._is_served = True

    def _ended(self) -> bool:
        with self._lock:
            is_idle = time.monotonic() - max(self._sent_at, self._line.sent_at) >= IDLE_SECONDS
            if self._pending or not (is_idle or self._pool() is None):
                return False
            self._is_served = False
            return True

    def _send_pending(self) -> None:
        with self._lock:
            notifications = dict(self._pending)
        try:
            self._line.close()
            self._send(notifications)
        except Exception as error:  # noqa: BLE001 - workers look by themselves, too
            logger.debug("a notification could not be sent: %s", error)
        with self._lock:
            for notification, transaction in notifications.items():
                if self._pending.get(notification) is transaction:
                    del self._pending[notification]
            self._sent_at = time.monotonic()

    def _send(self, notifications: dict[Notification, RootTransaction | None]) -> None:
        for notification, transaction in notifications.items():
            deadline = time.monotonic() + COMMIT_WAIT_SECONDS
            while transaction is not None and transaction.is_active and time.monotonic() < deadline:
                time.sleep(COMMIT_POLL_SECONDS)
            execute(self._engine, notify(), notification._asdict())


class NotifyConnection:
    """A connection on which a notification is sent, from any thread, without waiting for the answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._pooled: PoolProxiedConnection | None = None
        self._name = b""
        self.sent_at = -math.inf
        """When the last notification was sent, by time.monotonic()."""

    def open(self) -> None:
        """Take a connection, where there is no pooler in between."""
        pooled = self._engine.raw_connection()
        if not is_direct(pooled):
            pooled.close()
            return
        try:
            execute(pooled, FLUSH_NOTHING, {})
            # To plan it anew would take the server a fifth of the time until a notification arrives.
            name = prepare_statement(pooled, notify_only())
        except BaseException as error:
            pooled.invalidate(error)
            raise
        with self._lock:
            self._pooled, self._name = pooled, name

    def send(self, notification: Notification) -> bool:
        """Send a notification; return False if that would have to wait, or another was sent just now."""
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
        """Give the connection back, when the last notification is answered."""
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
                    # Not by the driver, which would wait with the interpreter's lock held.
                    if not selector.select(deadline - time.monotonic()):
                        raise psycopg.OperationalError("a notification was not answered in time")
        except psycopg.Error as error:
            self._drop(pooled, error)
        finally:
            pooled.close()

    def _drop(self, pooled: PoolProxiedConnection, error: Exception) -> None:
        pooled.invalidate(error)
        renew(self._engine)


def _is_answered(connection: psycopg.Connection[Any]) -> bool:
    """Tell whether all is answered, without waiting; raise the server's error, or that it is gone."""
    pgconn = connection.pgconn
    pgconn.consume_input()
    while not pgconn.is_busy():
        result = pgconn.get_result()
        if result is None:
            pgconn.consume_input()  # its end comes behind the server's last word
            return True
        fast_path.check(connection, result)
    return False


def _after_fork() -> None:
    # The threads are the parent's, and so are their notifiers, whose sockets must not be closed here.
    _inherited.append(dict(vars(threads)))
    threads.__init__()  # type: ignore[misc]


_inherited: list[object] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
