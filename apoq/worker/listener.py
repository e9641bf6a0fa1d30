"""Hears hints, and wakes the claimer."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any, Final, LiteralString, Self, cast
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import PoolProxiedConnection

from apoq.connections import ANSWER_TIMEOUT, execute, is_direct, own_engine
from apoq.databases import database_url
from apoq.statements.hint import CANCELLED, CHANNEL, Hint, hint
from apoq.watch import cut, watch

logger = logging.getLogger(__name__)

CHECK_INTERVAL: Final = 15.0
"""Seconds of silence after which the connection is asked whether it is still there."""

PATIENCE: Final = 5.0
"""Seconds within which a hint that was sent to try a connection must have arrived."""

RETRY: Final = 60.0
"""Seconds after which it is tried again whether hints arrive.

Ten times as many through a pooler, where each try may leave a session of others behind that listens: it hears
nothing there, but each NOTIFY wakes it.
"""


def listen_engine(url: str | URL) -> Engine:
    """Make an engine for the listener's connection alone, to the same database by another way."""
    if not isinstance(url, str | URL):
        raise TypeError(f"listen_url is a URL that leads to the server itself, not {type(url).__qualname__}")
    try:
        parsed = database_url(url)
    except (ArgumentError, ValueError):
        # What SQLAlchemy says may quote a part of a password.
        raise ValueError("listen_url is no URL, such as postgresql://user@host:5432/database") from None
    return own_engine(create_engine(parsed))


class Listener:
    """Listens on a connection of its own; without it, tasks are found when the worker looks by itself.

    A pooler in transaction mode takes a LISTEN, and then gives the session that listens to somebody else. So
    it is tried first whether what is sent through `engine` arrives on a connection of `listening`. Where the
    two are the same, who takes a hint gets the connection that heard it, to execute on meanwhile.
    """

    def __init__(
        self,
        engine: Engine,
        listening: Engine,
        awaited: frozenset[Hint],
        *,
        on_hint: Callable[[PoolProxiedConnection | None], None],
        on_cancelled: Callable[[set[int]], None],
        on_listening: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._listening = listening
        self._awaited = awaited
        self._on_hint = on_hint
        self._on_cancelled = on_cancelled
        self._on_listening = on_listening
        self._stopping = False
        self._has_warned = False
        self._connection: ListeningConnection | None = None

    def open(self) -> None:
        """Make ready to listen."""
        self._stopping = False
        # Waiting for the connection is ended by a byte that is written here.
        self._wake_receiver, self._wake_sender = socket.socketpair()

    def turn(self) -> float | None:
        """Listen until told to stop; where no hints arrive, answer when to try again."""
        with ListeningConnection(self._listening, self._wake_receiver) as connection:
            self._connection = connection
            try:
                if self._hears(connection):
                    self._listen(connection)
            finally:
                self._connection = None
        return RETRY if connection.is_direct else 10 * RETRY

    def renew(self) -> None:
        """Listen on another connection: this one may be dead without a word."""
        connection = self._connection
        if connection is not None:
            connection.cut()

    def stop(self) -> None:
        """End the turn that is under way."""
        self._stopping = True
        self._wake_sender.send(b"\0")

    def close(self) -> None:
        """Close what wakes it."""
        self._wake_receiver.close()
        self._wake_sender.close()

    def _hears(self, connection: ListeningConnection) -> bool:
        """Tell whether hints arrive on a connection, by sending one; if not, say so, once."""
        # On a channel of its own. Behind a pooler, what listens there is a session of others from now on, and
        # they are to get none of the workers' hints.
        channel = f"{CHANNEL}_{uuid4().hex}"
        connection.execute("LISTEN {}", channel)
        execute(self._engine, hint(), Hint(channel, "")._asdict())
        deadline = time.monotonic() + PATIENCE
        heard: list[Hint] = []
        while not heard and not self._stopping and (left := deadline - time.monotonic()) > 0:
            heard = connection.wait(left)
        connection.execute("UNLISTEN {}", channel)
        if heard:
            logger.debug("hints arrive")
            self._has_warned = False
        elif not self._stopping:
            logger.log(
                logging.DEBUG if self._has_warned else logging.WARNING,
                "no hints arrive on the connection that listens, as behind a pooler in transaction mode: "
                "tasks are found by looking, every poll_interval. To have them found at once, give "
                "Worker(…, listen_url=…) a URL that leads to the same database past the pooler",
            )
            self._has_warned = True
        return bool(heard)

    def _listen(self, connection: ListeningConnection) -> None:
        for channel in (CANCELLED, CHANNEL):
            connection.execute("LISTEN {}", channel)
        self._on_listening()
        # By another way than the worker's own, its role need not be allowed to claim.
        ours = connection.pooled if self._listening is self._engine else None
        # What was added before this connection listened has given its hint to nobody.
        self._on_hint(ours)
        while not self._stopping:
            hints = connection.wait(CHECK_INTERVAL)
            if not self._awaited.isdisjoint(hints):
                self._on_hint(ours)
            if cancelled := {_id(hint.payload) for hint in hints if hint.channel == CANCELLED}:
                self._on_cancelled(cancelled)
            if not hints and not self._stopping:
                connection.execute("SELECT 1")


class ListeningConnection:
    """A connection of an engine's that is the listener's alone, and what was heard on it."""

    def __init__(self, engine: Engine, waker: socket.socket) -> None:
        self.pooled = engine.raw_connection()
        self.is_direct = is_direct(self.pooled)
        self._driver = cast("psycopg.Connection[Any]", self.pooled.driver_connection)
        self.pooled.detach()
        self._driver.autocommit = True
        self._encoding = self._driver.info.encoding
        self._heard: list[Hint] = []
        # What comes beside the answer to a statement, the driver hears, and tells here.
        self._driver.add_notify_handler(self._hear)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._driver, selectors.EVENT_READ)
        self._selector.register(waker, selectors.EVENT_READ)

    def execute(self, statement: LiteralString, *names: str) -> None:
        """Execute a statement with these names in it."""
        watch.begin(self._driver, ANSWER_TIMEOUT)
        try:
            self._driver.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
        finally:
            watch.end(self._driver)

    def wait(self, seconds: float) -> list[Hint]:
        """Wait for notifications, until the time is up or the waker has something to read."""
        if self._driver.closed:
            # A claim has found it lost; its socket is gone, and there is nothing to wait for.
            raise psycopg.OperationalError("the connection that listens is lost")
        if not self._heard:
            self._selector.select(seconds)
            # Past Connection.notifies, which takes 0.1 ms to find out what is there already.
            pgconn = self._driver.pgconn
            pgconn.consume_input()
            while notify := pgconn.notifies():
                channel, payload = notify.relname, notify.extra
                self._heard.append(Hint(channel.decode(self._encoding), payload.decode(self._encoding)))
        heard, self._heard = self._heard, []
        return heard

    def cut(self) -> None:
        """End it, from another thread."""
        cut(self._driver)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self.pooled.close()
        self._driver.close()

    def _hear(self, notify: psycopg.Notify) -> None:
        self._heard.append(Hint(notify.channel, notify.payload))


def _id(payload: str) -> int:
    # Anybody may notify, of anything: no task has this id.
    return int(payload) if payload.isdecimal() else 0
