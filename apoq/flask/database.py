"""The session in which an application adds tasks, and the engine of its worker."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from flask import Flask, current_app, has_app_context
from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from apoq.client.session_adapters import AsyncioSession, SyncSession, bind_of
from apoq.errors import ApoqError, UnsupportedSession
from apoq.postgres.urls import sync_side

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]


class Database:
    """The SQLAlchemy extension of an application, or the session that it gave to `Apoq`.

    The extension is looked up at the first use, so that extensions may be initialised in any order.
    """

    def __init__(
        self,
        app: Flask,
        *,
        bind: str | None,
        session: Callable[[], AnySession] | None,
    ) -> None:
        self._app = app
        self._bind = bind
        self._session = session

    @cached_property
    def engine(self) -> Engine | AsyncEngine:
        """The engine of the worker and the commands."""
        # In the current context, if it is this application's: the exit of another context would close the
        # thread's scoped session.
        is_current = has_app_context() and current_app == self._app
        with nullcontext() if is_current else self._app.app_context():
            engine = self._target().engine
        return AsyncEngine(engine) if engine.dialect.is_async else engine

    @property
    def bind(self) -> str:
        """The name of that engine's bind, as Flask-Migrate's template for several binds uses it.

        It is "" for the default bind, and for a bind of the same database.
        """
        own, engines = sync_side(self.engine), self._engines()
        default = engines.pop(None, None)
        if default is None or _place(sync_side(default.engine)) == _place(own):
            return ""
        return next((key or "" for key, each in engines.items() if sync_side(each.engine) is own), "")

    def session(self) -> Session | AsyncSession:
        """Return the session of the current application context."""
        found: AnySession = self._session() if self._session else self._extensions_session()
        # A scoped session returns the current session when it is called.
        return found() if isinstance(found, scoped_session | async_scoped_session) else found

    def joined(self, given: SyncSession | AsyncioSession | None) -> SyncSession | AsyncioSession:
        """Return the session or connection to add a task through, for a given session or the current one.

        It is in the same transaction. Raises `UnsupportedSession` if that session is on another database than
        the tasks of the application.
        """
        if isinstance(given, scoped_session | async_scoped_session):
            given = given()
        session = self.session() if given is None else given
        if isinstance(session, Session | AsyncSession):
            engine: Engine | AsyncEngine = bind_of(_sync(session)).engine
        elif isinstance(session, Connection | AsyncConnection):
            engine = session.engine
        else:
            return session  # psycopg's
        if not self._is_elsewhere(sync_side(engine)):
            return session
        if self._bind is not None and isinstance(session, Session) and session is self.session():
            # The connection of the same session on the engine of the tasks.
            return session.connection(bind_arguments={"bind": self._target()})
        raise UnsupportedSession(
            f"session must be on the database of this application's tasks, {_place(self.engine)}, got one on "
            f"{_place(engine)}: add the task through another session, or set APOQ_BIND to the bind of this "
            "session"
        )

    def _session_without_request(self) -> Session | AsyncSession:
        try:
            return self.session()
        except (RuntimeError, AttributeError, LookupError) as error:
            if self._session is None:
                raise
            raise ApoqError(
                "the function of Apoq(session=…) must return a session without a request, too, because the "
                f"worker and the commands need its engine, but it raised {type(error).__name__}: "
                f"{' '.join(str(error).split())}: pass a scoped_session, or let the function create a session"
            ) from error

    def _extensions_session(self) -> Any:
        db = self._extension()
        return db.async_session if not db.engines and self._engines() else db.session

    def _extension(self) -> Any:
        try:
            return self._app.extensions["sqlalchemy"]
        except KeyError:
            raise ApoqError(
                f"the application {self._app.name!r} must have Flask-SQLAlchemy or Flask-SQLAlchemy-Lite: "
                "call its init_app, or pass your own session, Apoq(session=…)"
            ) from None

    def _engines(self) -> dict[str | None, Any]:
        """Return the extension's engines, which may be connections in a test that rolls back."""
        db = self._app.extensions.get("sqlalchemy")
        return {**getattr(db, "async_engines", {}), **db.engines} if db else {}

    def _target(self) -> Any:
        """Return the engine of apoq's tables, or the connection that replaces it in a test."""
        if self._bind is None:
            return bind_of(_sync(self._session_without_request()))
        self._extension()
        engines = self._engines()
        if self._bind not in engines:
            known = ", ".join(repr(name) for name in engines if name is not None) or "none"
            raise ApoqError(f"APOQ_BIND must be one of the application's binds ({known}), got {self._bind!r}")
        found = engines[self._bind]
        return sync_side(found)

    def _is_elsewhere(self, engine: Engine) -> bool:
        own = sync_side(self.engine)
        if engine is own:
            return False
        if any(engine is sync_side(known.engine) for known in self._engines().values()):
            return _place(engine) != _place(own)
        # Host and port may differ, because one of the engines may use a pooler.
        return engine.url.database != own.url.database


def _sync(session: Session | AsyncSession) -> Session:
    return session.sync_session if isinstance(session, AsyncSession) else session


def _place(engine: Engine | AsyncEngine) -> str:
    """Return the name and the place of a database, without the password."""
    host = engine.url.host or engine.url.query.get("host") or ""
    port = engine.url.port or engine.url.query.get("port") or ""
    return f"{engine.url.database!r} on {host}{port and f':{port}'}" if host else repr(engine.url.database)
