"""After a caller's commit, wake the workers.

A hint is only ever that: it may come early, twice or never, and nothing depends on it. It travels after the
commit and on a connection of its own, because commits that notify wait for each other, one by one.
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
from apoq.schema.statements.hint import Hint

logger = logging.getLogger(__name__)

_KEY: Final = "apoq.client.after_commit"


def hint_after_session_commit(session: Session, engine: Engine, hint_: Hint) -> None:
    """Wake a queue's workers once the session's transaction has committed."""
    _listen()
    session.info.setdefault(_KEY, set()).add((engine, hint_))


@cache
def _listen() -> None:
    # Once, and to all sessions: a listener of its own would cost each a twentieth of all that adding takes.
    event.listen(Session, "after_commit", _session_committed)


def _session_committed(session: Session) -> None:
    waiting: set[tuple[Engine, Hint]] | None = session.info.get(_KEY)
    if not waiting or session.in_nested_transaction():
        return  # a savepoint was released; the commit is still to come
    for engine, hint_ in waiting:
        _send(engine, hint_)
    waiting.clear()


def hint_after_connection_commit(connection: Connection, hint_: Hint) -> None:
    """Wake a queue's workers once the connection's transaction has committed."""
    if connection not in _waiting:
        _waiting[connection] = set()
        event.listen(connection, "commit", _connection_commits)
    _waiting[connection].add(hint_)


def _connection_commits(connection: Connection) -> None:
    # SQLAlchemy tells before it commits, so the hint watches for the end of the transaction.
    for hint_ in _waiting[connection]:
        _send(connection.engine, hint_, connection.get_transaction())
    _waiting[connection].clear()


_hinters: WeakKeyDictionary[Pool, Notifier] = WeakKeyDictionary()
"""By pool, because `Engine.execution_options` and an `AsyncEngine` make engines that share one."""
_waiting: WeakKeyDictionary[Connection, set[Hint]] = WeakKeyDictionary()
_inherited: list[object] = []


def _send(engine: Engine, hint_: Hint, transaction: RootTransaction | None = None) -> None:
    try:
        pool = engine.pool
        hinter = _hinters.get(pool)
        if hinter is None:
            hinter = _hinters.setdefault(pool, Notifier(engine))
        hinter.send(hint_, transaction)
    except Exception:  # the caller has committed, and is not to be told otherwise
        logger.exception("a hint could not be given; the workers find the tasks when they look next")


@atexit.register
def _flush() -> None:
    threads.flush(COMMIT_WAIT_SECONDS)


def _after_fork() -> None:
    # The parent's sockets: kept, because closing them here would end the parent's sessions.
    _inherited.append(dict(_hinters))
    _hinters.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
