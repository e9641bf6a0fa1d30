"""Hears hints, and wakes the claimer."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable
from typing import Any, Final

from psycopg import sql
from sqlalchemy import Engine

from apoq.connections import ANSWER_TIMEOUT
from apoq.statements.hint import CHANNEL
from apoq.watch import watch

CHECK_INTERVAL: Final = 15.0
"""Seconds of silence after which the connection is asked whether it is still there."""


class Listener:
    """Listens on a connection of its own; without it, tasks are found when the worker looks by itself."""

    def __init__(
        self,
        engine: Engine,
        payloads: frozenset[str],
        *,
        on_hint: Callable[[], None],
        on_listening: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._payloads = payloads
        self._on_hint = on_hint
        self._on_listening = on_listening
        self._stopping = False

    def open(self) -> None:
        """Make ready to listen."""
        self._stopping = False
        # Waiting for the connection is ended by a byte that is written here.
        self._wake_receiver, self._wake_sender = socket.socketpair()

    def turn(self) -> float | None:
        """Listen until told to stop."""
        pooled = self._engine.raw_connection()
        connection: Any = pooled.driver_connection
        pooled.detach()
        try:
            self._execute(connection, sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
            self._on_listening()
            # What was added before this connection listened has given its hint to nobody.
            self._on_hint()
            while not self._stopping:
                self._wait(connection)
        finally:
            pooled.close()
            connection.close()
        return None

    def stop(self) -> None:
        """End the turn that is under way."""
        self._stopping = True
        self._wake_sender.send(b"\0")

    def close(self) -> None:
        """Close what wakes it."""
        self._wake_receiver.close()
        self._wake_sender.close()

    def _execute(self, connection: Any, statement: sql.Composable) -> None:
        watch.begin(connection, ANSWER_TIMEOUT, self._engine)
        try:
            connection.execute(statement)
        finally:
            watch.end(connection)

    def _wait(self, connection: Any) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            ready = {key.fileobj for key, _ in selector.select(CHECK_INTERVAL)}
        if not ready:
            self._execute(connection, sql.SQL("SELECT 1"))
        elif connection in ready:
            hints = list(connection.notifies(timeout=0))
            if any(hint.payload in self._payloads for hint in hints):
                self._on_hint()
