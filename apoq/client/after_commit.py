"""Notify the workers after a caller's commit.

A notification may arrive early, twice or never; correctness doesn't depend on it. It is sent after the
commit, on another connection, because PostgreSQL serialises commits of transactions that contain a NOTIFY.
"""

from __future__ import annotations

import atexit
import logging
import os
from functools import cache
from typing import Final
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import RootTransaction
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from apoq.client.notifier import COMMIT_WAIT_SECONDS, Notifier, threads
from apoq.schema.statements.notify import Notification

logger = logging.getLogger(__name__)

_KEY: Final = "apoq.client.after_commit"


def notify_after_session_commit(session: Session, engine: Engine, notification: Notification) -> None:
    """Notify the workers when the session's transaction has committed."""
    _listen()
    session.info.setdefault(_KEY, set()).add((engine, notification))


@cache
def _listen() -> None:
    # One listener for all sessions: one for each session would make `add` 5 % slower.
    event.listen(Session, "after_commit", _session_committed)


def _session_committed(session: Session) -> None:
    waiting: set[tuple[Engine, Notification]] | None = session.info.get(_KEY)
    if not waiting or session.in_nested_transaction():
        return  # only a savepoint was released
    for engine, notification in waiting:
        _send(engine, notification)
    waiting.clear()


def notify_after_connection_commit(connection: Connection, notification: Notification) -> None:
    """Notify the workers when the connection's transaction has committed."""
    if connection not in _waiting:
        _waiting[connection] = set()
        event.listen(connection, "commit", _connection_commits)
    _waiting[connection].add(notification)


def _connection_commits(connection: Connection) -> None:
    # SQLAlchemy emits this event before the commit, so the notifier waits for the end of the transaction.
    for notification in _waiting[connection]:
        _send(connection.engine, notification, connection.get_transaction())
    _waiting[connection].clear()


_notifiers: WeakKeyDictionary[Pool, Notifier] = WeakKeyDictionary()
"""By pool, because `Engine.execution_options` and `AsyncEngine` make several engines that share one pool."""
_waiting: WeakKeyDictionary[Connection, set[Notification]] = WeakKeyDictionary()
_inherited: list[object] = []


def _send(engine: Engine, notification: Notification, transaction: RootTransaction | None = None) -> None:
    try:
        pool = engine.pool
        notifier = _notifiers.get(pool)
        if notifier is None:
            notifier = _notifiers.setdefault(pool, Notifier(engine))
        notifier.send(notification, transaction)
    except Exception:  # not raised, because the caller's commit has succeeded
        logger.exception("the workers could not be notified; they find the tasks at their next poll")


@atexit.register
def _flush() -> None:
    threads.flush(COMMIT_WAIT_SECONDS)


def _after_fork() -> None:
    # Kept in memory, because closing the parent's sockets here would end the parent's sessions.
    _inherited.append(dict(_notifiers))
    _notifiers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
