"""After a caller's commit, wake the workers.

A hint is only ever that: it may come early, twice or never, and nothing depends on it. It travels after the
commit and on a connection of its own, because commits that notify wait for each other, one by one.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from functools import cache
from typing import Final
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import RootTransaction
from sqlalchemy.orm import Session

from apoq.connections import execute, own_engine
from apoq.statements.hint import Hint, hint

logger = logging.getLogger(__name__)

LINGER: Final = 5.0
"""Seconds without a hint after which the thread ends and its connection is closed."""

REST: Final = 20
"""How many times as long as a round of hints took the thread rests after it, for others want to commit."""

LONGEST_REST: Final = 0.02
"""Seconds by which a hint is late at most, after another."""

WATCH: Final = 0.0005
"""Seconds between two looks whether a commit has come through."""

PATIENCE: Final = 1.0
"""Seconds for which a hint waits for a commit to come through."""

_KEY: Final = "apoq.hints"


def hint_after_session_commit(session: Session, engine: Engine, hint_: Hint) -> None:
    """Wake a queue's workers once the session's transaction has committed."""
    _listen()
    session.info.setdefault(_KEY, set()).add((engine, hint_))


@cache
def _listen() -> None:
    # To all sessions at once, for a listener of its own takes each as long as its INSERT takes SQLAlchemy.
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


class Hinter:
    """Sends an engine's hints, from a thread that runs while there are any."""

    def __init__(self, engine: Engine) -> None:
        self._engine = own_engine(engine)
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._pending: dict[Hint, RootTransaction | None] = {}
        self._thread: threading.Thread | None = None

    def send(self, hint_: Hint, transaction: RootTransaction | None = None) -> None:
        """Send a hint soon: when the transaction is over, if one is given. Never waits."""
        with self._lock:
            self._pending[hint_] = transaction
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="apoq-hints", daemon=True)
                self._thread.start()
        self._woken.set()

    def flush(self, timeout: float) -> None:
        """Wait until what is pending has been sent."""
        deadline = time.monotonic() + timeout
        while self._pending and time.monotonic() < deadline:
            time.sleep(WATCH)

    def _run(self) -> None:
        while self._woken.wait(LINGER) or not self._ended():
            self._woken.clear()
            with self._lock:
                hints = dict(self._pending)
            began = time.monotonic()
            try:
                self._send(hints)
            except Exception as error:  # noqa: BLE001 - workers look by themselves, too
                logger.debug("a hint could not be sent: %s", error)
            with self._lock:
                for hint_, transaction in hints.items():
                    if self._pending.get(hint_) is transaction:
                        del self._pending[hint_]
            time.sleep(min(LONGEST_REST, REST * (time.monotonic() - began)))
        self._engine.dispose()

    def _ended(self) -> bool:
        with self._lock:
            if self._pending:
                return False
            self._thread = None
            return True

    def _send(self, hints: dict[Hint, RootTransaction | None]) -> None:
        for hint_, transaction in hints.items():
            deadline = time.monotonic() + PATIENCE
            while transaction is not None and transaction.is_active and time.monotonic() < deadline:
                time.sleep(WATCH)
            execute(self._engine, hint(), hint_._asdict())


_hinters: WeakKeyDictionary[Engine, Hinter] = WeakKeyDictionary()
_waiting: WeakKeyDictionary[Connection, set[Hint]] = WeakKeyDictionary()
_inherited: list[object] = []


def _send(engine: Engine, hint_: Hint, transaction: RootTransaction | None = None) -> None:
    try:
        hinter = _hinters.get(engine)
        if hinter is None:
            hinter = _hinters.setdefault(engine, Hinter(engine))
        hinter.send(hint_, transaction)
    except Exception:  # the caller has committed, and is not to be told otherwise
        logger.exception("a hint could not be given; the workers find the tasks when they look next")


@atexit.register
def _flush() -> None:
    for hinter in list(_hinters.values()):
        hinter.flush(PATIENCE)


def _after_fork() -> None:
    # The parent's sockets: kept, for closing them here would end the parent's sessions.
    _inherited.append(dict(_hinters))
    _hinters.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
