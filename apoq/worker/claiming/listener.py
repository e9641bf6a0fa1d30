"""Receives notifications, and lets the claimer claim."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, LiteralString, NamedTuple, Self, cast
from uuid import uuid4

import psycopg
from psycopg import sql
from psycopg.pq.misc import PGnotify
from sqlalchemy import URL, Engine, create_engine

from apoq.client.queue import Queue
from apoq.core.pace import MAX_INTERVAL_SECONDS
from apoq.errors import InvalidURL
from apoq.postgres.connections import ANSWER_TIMEOUT_SECONDS, execute, is_direct, own_engine
from apoq.postgres.urls import database_url
from apoq.postgres.watchdog import cut, watch
from apoq.schema.statements.notify import (
    CANCELLED,
    CHANNEL,
    LIMITED,
    LINKED,
    PAUSED,
    Notification,
    arrays,
    has_links,
    has_tasks,
    notify,
    was_limited,
    was_paused,
)
from apoq.worker import logs
from apoq.worker.claiming.claimer import Claimer
from apoq.worker.database import WorkerDatabase
from apoq.worker.service import Service

CHECK_INTERVAL_SECONDS: Final = 15.0
"""Seconds of silence after which the connection is tested."""

PROBE_TIMEOUT_SECONDS: Final = 5.0
"""Seconds within which a notification that was sent as a test must arrive."""

PROBE_RETRY_SECONDS: Final = 60.0
"""Seconds after which it is tested again whether notifications arrive.

Ten times as many through a pooler: there, each test may leave behind a session that listens although it
belongs to another client, and each NOTIFY wakes it.
"""

MAX_NOTIFICATIONS: Final = 1_000
"""Notifications that are read at most before the listener reacts to them."""

LONGEST_ID: Final = len(str(2**63 - 1))
"""Digits of a task's id, at most."""

CROWD_SIZE: Final = 100
"""Notifications at once that are too many for claims on the same connection.

The server reads a statement only after it has sent all notifications of that session.
"""

CROWD_SECONDS: Final = 1.0
"""Seconds for which claims are then made on another connection."""

FLOOD_SECONDS: Final = 1.0
"""Seconds after which the listener gives up, if there are always more notifications than it has read.

Any role that may connect can send them. Unread notifications stay in a queue of the server that all sessions
share, and to send them takes the server as much time as the worker needs to read them.
"""

REST_FACTOR: Final = 5
"""The listener rests so many times as long as it took to read: other threads have more to do."""


class Received(NamedTuple):
    """The notifications that were read at once."""

    number: int
    expected: set[Notification]
    """Those of them that were expected."""
    cancelled: set[int]
    """The ids of tasks that may have been cancelled."""
    is_all: bool
    """Whether there were no more."""


def listen_engine(url: str | URL) -> Engine:
    """Make an engine for the listener's connection alone, to the same database by another way."""
    if not isinstance(url, str | URL):
        raise TypeError(f"listen_url is a URL that leads to the server itself, not {type(url).__qualname__}")
    try:
        parsed = database_url(url)
    except InvalidURL as error:
        raise InvalidURL(f"listen_url: {error}") from None
    return own_engine(create_engine(parsed))


class Listener(Service):
    """Listens on a connection of its own; without notifications, the worker finds tasks by polling.

    A pooler in transaction mode accepts LISTEN, and then gives the session that listens to another client. So
    the listener first tests whether a notification that is sent through the worker's engine arrives on a
    connection of `listening`. If the two engines are the same, the claimer executes on the connection that
    was notified.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        listening: Engine,
        claimer: Claimer,
        *,
        on_cancelled: Callable[[set[int] | None], None],
        on_paused: Callable[[Queue], None],
        on_limited: Callable[[Queue], None],
        on_linked: Callable[[str | None], None],
    ) -> None:
        """`on_cancelled` is called with the ids of tasks that may have been cancelled; None: any may have."""
        super().__init__("apoq-listener", database.outage)
        self._engine = database.engine
        self._listening = listening
        self._with_tasks = {has_tasks(queue.schema, queue.name): queue for queue in database.queues}
        self._paused = {was_paused(queue.schema, queue.name): queue for queue in database.queues}
        self._limited = {was_limited(queue.schema, queue.name): queue for queue in database.queues}
        self._claimer = claimer
        self._on_cancelled = on_cancelled
        self._on_paused = on_paused
        self._on_limited = on_limited
        self._linked = {has_links(queue.schema): queue.schema for queue in database.queues}
        self._on_linked = on_linked
        self._has_warned = False
        self._is_flooded = False
        self._connection: ListeningConnection | None = None
        self._waker: tuple[socket.socket, socket.socket] | None = None
        """A byte that is written to the second one ends waiting for the connection."""

    def start(self) -> None:
        """Listen from now on, on a thread."""
        if self._waker is None:
            self._waker = socket.socketpair()
        super().start()

    def turn(self) -> float | None:
        """Listen until `end`; if no notifications arrive, return when to try again."""
        assert self._waker is not None
        with ListeningConnection(self._listening, self._waker[0]) as connection:
            self._connection = connection
            try:
                if self._receives(connection):
                    self._listen(connection)
            except psycopg.Error:
                if not connection.is_cut:
                    raise
                return 0.0  # not the server's fault: the worker has cut it
            finally:
                self._connection = None
        return PROBE_RETRY_SECONDS if connection.is_direct else 10 * PROBE_RETRY_SECONDS

    def renew(self) -> None:
        """Listen on another connection: this one may be dead without a word."""
        connection = self._connection
        if connection is not None:
            connection.cut()

    def end(self) -> None:
        """End the turn that is under way, and take no more."""
        super().end()
        if (waker := self._waker) is not None:
            with suppress(OSError):  # it has just ended by itself
                waker[1].send(b"\0")

    def stop(self, timeout: float | None = None) -> bool:
        """End, and wait for that; return whether it has ended within `timeout` seconds."""
        has_ended = super().stop(timeout)
        if has_ended:
            self.after_last_turn()  # its thread could not be started, or has died
        return has_ended

    def after_last_turn(self) -> None:
        """Close what ends the waiting."""
        if (waker := self._waker) is not None:
            self._waker = None
            for each in waker:
                each.close()

    def _receives(self, connection: ListeningConnection) -> bool:
        """Return whether notifications arrive on a connection, by sending one; if not, log that once."""
        # On a channel of its own. Behind a pooler, the session that listens belongs to another client from
        # now on, and must get none of the workers' notifications.
        trial = Notification(f"{CHANNEL}_{uuid4().hex}", "")
        connection.listen([trial.channel], {trial})
        execute(self._engine, notify(), arrays([trial]))
        deadline = time.monotonic() + PROBE_TIMEOUT_SECONDS
        has_arrived = False
        while not has_arrived and not self._is_ending and (left := deadline - time.monotonic()) > 0:
            has_arrived = bool(connection.wait(left).expected)
        connection.execute("UNLISTEN {}", trial.channel)
        if has_arrived:
            logs.notifications_arrive()
            self._has_warned = False
        elif not self._is_ending:
            logs.no_notifications(is_news=not self._has_warned)
            self._has_warned = True
        return has_arrived

    def _listen(self, connection: ListeningConnection) -> None:
        awaited = {**self._with_tasks, **self._paused, **self._limited, **self._linked}
        connection.listen([CANCELLED, PAUSED, LIMITED, LINKED, CHANNEL], awaited)
        self.recovered()
        self._on_cancelled(None)  # until now, cancellations did not notify this connection
        # With listen_url, the role of this connection may not be allowed to claim.
        ours = connection.pooled if self._listening is self._engine else None
        # Tasks that were added before this connection listened have not notified it.
        self._claimer.notified(None, ours)
        began = caught_up_at = time.monotonic()
        crowded_until = 0.0
        while not self._is_ending:
            received = connection.wait(CHECK_INTERVAL_SECONDS)
            read_at = time.monotonic()
            if received.is_all:
                caught_up_at = read_at
            elif read_at - caught_up_at > FLOOD_SECONDS:
                self._give_up()
                return
            if received.number > CROWD_SIZE:
                crowded_until = read_at + CROWD_SECONDS
            self._tell(received.expected)
            if with_tasks := received.expected & self._with_tasks.keys():
                queues = [self._with_tasks[notification] for notification in with_tasks]
                self._claimer.notified(queues, ours if read_at > crowded_until else None)
            if received.cancelled:
                self._on_cancelled(received.cancelled)
            if self._is_flooded and received.is_all and read_at - began > CHECK_INTERVAL_SECONDS:
                self._is_flooded = False
                logs.notifications_read_again()
            if not received.number and not self._is_ending:
                connection.execute("SELECT 1")
            time.sleep(min(MAX_INTERVAL_SECONDS, REST_FACTOR * (read_at - connection.woke_at)))

    def _tell(self, received: set[Notification]) -> None:
        """Call who wants to know of pauses, limits and edges."""
        for paused in received & self._paused.keys():
            self._on_paused(self._paused[paused])
        for limited in received & self._limited.keys():
            self._on_limited(self._limited[limited])
        for linked in received & self._linked.keys():
            self._on_linked(self._linked[linked])

    def _give_up(self) -> None:
        logs.too_many_notifications(PROBE_RETRY_SECONDS, is_news=not self._is_flooded)
        self._is_flooded = True


class ListeningConnection:
    """A connection of its own for the listener, and the notifications that it has received."""

    def __init__(self, engine: Engine, waker: socket.socket) -> None:
        self._engine = engine
        self.pooled = engine.raw_connection()
        self.is_direct = is_direct(self.pooled)
        self._driver = cast("psycopg.Connection[Any]", self.pooled.driver_connection)
        self.pooled.detach()
        self._driver.autocommit = True
        self.woke_at = 0.0
        """When `wait` has found something to read, by time.monotonic()."""
        self.is_cut = False
        self._awaited: dict[tuple[bytes, bytes], Notification] = {}
        self._forget()
        # For notifications that arrive together with the result of a statement. Not add_notify_handler: for
        # it, psycopg decodes each, and raises an error if one isn't text in the connection's encoding.
        self._driver.pgconn.notify_handler = self._note
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._driver, selectors.EVENT_READ)
        self._selector.register(waker, selectors.EVENT_READ)

    def execute(self, statement: LiteralString, *names: str) -> None:
        """Execute a statement with these names in it."""
        with watch.awaiting(self._driver, ANSWER_TIMEOUT_SECONDS, self._engine):
            self._driver.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def listen(self, channels: Iterable[str], awaited: Iterable[Notification]) -> None:
        """Listen on these channels, for these notifications, and for those of cancelled tasks."""
        self._awaited = {
            (notification.channel.encode(), notification.payload.encode()): notification
            for notification in awaited
        }
        # In one statement: if there are many notifications on the first channel, the server would not read a
        # second statement for a long time.
        names = [*channels]
        self.execute("; ".join(["LISTEN {}"] * len(names)), *names)

    def wait(self, seconds: float) -> Received:
        """Wait for notifications, until the time is up or the waker has something to read."""
        if self._driver.closed:
            # A claim has found that it is lost: its socket is closed, and can't be waited for.
            raise psycopg.OperationalError("the connection that listens is lost")
        if not self._count:
            self._selector.select(seconds)
        self.woke_at = time.monotonic()
        # Not Connection.notifies, which takes 0.1 ms for notifications that have arrived already.
        pgconn = self._driver.pgconn
        is_all = False
        while not is_all and self._count < MAX_NOTIFICATIONS:
            before = self._count
            pgconn.consume_input()
            while notify := pgconn.notifies():
                self._note(notify)
            is_all = self._count == before
        received = Received(self._count, self._arrived, self._cancelled, is_all)
        self._forget()
        return received

    def cut(self) -> None:
        """Close it, from another thread."""
        self.is_cut = True
        cut(self._driver)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self.pooled.close()
        self._driver.close()

    def _forget(self) -> None:
        self._count = 0
        self._arrived: set[Notification] = set()
        self._cancelled: set[int] = set()

    def _note(self, notify: PGnotify) -> None:
        # Any role may send any notification, as often as it likes. Only those that can be meant for this
        # worker are kept, and not more than it can look at.
        self._count += 1
        if notify.relname == _CANCELLED:
            is_id = notify.extra.isdigit() and len(notify.extra) <= LONGEST_ID
            if is_id and len(self._cancelled) < MAX_NOTIFICATIONS:
                self._cancelled.add(int(notify.extra))
        elif notification := self._awaited.get((notify.relname, notify.extra)):
            self._arrived.add(notification)


_CANCELLED: Final = CANCELLED.encode()
