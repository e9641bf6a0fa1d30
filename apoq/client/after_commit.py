"""After a caller's commit, wake the workers.

A notification may come early, twice or never, and nothing depends on it. It is sent after the commit and on a
connection of its own, because commits that notify wait for each other, one by one.
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
    """Wake a queue's workers once the session's transaction has committed."""
    _listen()
    session.info.setdefault(_KEY, set()).add((engine, notification))


@cache
def _listen() -> None:
    # Once, and to all sessions: a listener of its own would cost each a twentieth of all that adding takes.
    event.listen(Session, "after_commit", _session_committed)


def _session_committed(session: Session) -> None:
    waiting: set[tuple[Engine, Notification]] | None = session.info.get(_KEY)
    if not waiting or session.in_nested_transaction():
        return  # a savepoint was released; the commit is still to come
    for engine, notification in waiting:
        _send(engine, notification)
    waiting.clear()


def notify_after_connection_commit(connection: Connection, notification: Notification) -> None:
    """Wake a queue's workers once the connection's transaction has committed."""
    if connection not in _waiting:
        _waiting[connection] = set()
        event.listen(connection, "commit", _connection_commits)
    _waiting[connection].add(notification)


def _connection_commits(connection: Connection) -> None:
    # SQLAlchemy tells before it commits, so the notification watches for the end of the transaction.
    for notification in _waiting[connection]:
        _send(connection.engine, notification, connection.get_transaction())
    _waiting[connection].clear()


_notifiers: WeakKeyDictionary[Pool, Notifier] = WeakKeyDictionary()
"""By pool, because `Engine.execution_options` and an `AsyncEngine` make engines that share one."""
_waiting: WeakKeyDictionary[Connection, set[Notification]] = WeakKeyDictionary()
_inherited: list[object] = []


def _send(engine: Engine, notification: Notification, transaction: RootTransaction | None = None) -> None:
    try:
        pool = engine.pool
        notifier = _notifiers.get(pool)
        if notifier is None:
            notifier = _notifiers.setdefault(pool, Notifier(engine))
        notifier.send(notification, transaction)
    except Exception:  # the caller has committed, and is not to be told otherwise
        logger.exception("the workers could not be notified; they find the tasks when they look next")


@atexit.register
def _flush() -> None:
    threads.flush(COMMIT_WAIT_SECONDS)


def _after_fork() -> None:
    # The parent's sockets: kept, because closing them here would end the parent's sessions.
    _inherited.append(dict(_notifiers))
    _notifiers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
