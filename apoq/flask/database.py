"""Where an application's tasks are: which session they are added in, and which engine they are worked on."""

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
    """What an application has of SQLAlchemy: Flask-SQLAlchemy, Flask-SQLAlchemy-Lite, or its own session.

    It is looked for when it is needed, so that extensions may be initialised in any order.
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
        """The engine that workers and commands use."""
        # In the current context, if it is this application's: to leave another one would end what a
        # scoped session of the thread's has begun.
        is_current = has_app_context() and current_app == self._app
        with nullcontext() if is_current else self._app.app_context():
            engine = self._target().engine
        return AsyncEngine(engine) if engine.dialect.is_async else engine

    @property
    def bind(self) -> str:
        """The bind of that engine, as Flask-Migrate's template for several binds names its functions.

        "" is the default one; so is any that leads to the same database.
        """
        own, engines = sync_side(self.engine), self._engines()
        default = engines.pop(None, None)
        if default is None or _place(sync_side(default.engine)) == _place(own):
            return ""
        return next((key or "" for key, each in engines.items() if sync_side(each.engine) is own), "")

    def session(self) -> Session | AsyncSession:
        """Answer the session of the current application context."""
        found: AnySession = self._session() if self._session else self._extensions_session()
        # A registry of sessions is called for the current one.
        return found() if isinstance(found, scoped_session | async_scoped_session) else found

    def joined(self, given: SyncSession | AsyncioSession | None) -> SyncSession | AsyncioSession:
        """Answer what a task is added through, to be in the transaction of a session: the current one's.

        Raises `UnsupportedSession` where that session's tables are in another database.
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
            # The same session, in its transaction on the other engine.
            return session.connection(bind_arguments={"bind": self._target()})
        raise UnsupportedSession(
            f"this session would put the task into {_place(engine)}, and this application's tasks are in "
            f"{_place(self.engine)}: add it through a session on that database, or let APOQ_BIND name "
            "the bind that this session uses"
        )

    def _extensions_session(self) -> Any:
        db = self._extension()
        return db.async_session if not db.engines and self._engines() else db.session

    def _extension(self) -> Any:
        try:
            return self._app.extensions["sqlalchemy"]
        except KeyError:
            raise ApoqError(
                f"apoq finds no database in the application {self._app.name!r}: call init_app of "
                "Flask-SQLAlchemy or Flask-SQLAlchemy-Lite on it, or give a session: Apoq(session=…)"
            ) from None

    def _engines(self) -> dict[str | None, Any]:
        """Answer the extension's engines; in a test that rolls back, connections may stand for them."""
        db = self._app.extensions.get("sqlalchemy")
        return {**getattr(db, "async_engines", {}), **db.engines} if db else {}

    def _target(self) -> Any:
        """Where apoq's tables are: an engine, or the connection that a test has put in its place."""
        if self._bind is None:
            return bind_of(_sync(self.session()))
        self._extension()
        engines = self._engines()
        if self._bind not in engines:
            known = ", ".join(repr(name) for name in engines if name is not None) or "none"
            raise ApoqError(f"APOQ_BIND is {self._bind!r}, and the application's binds are: {known}")
        found = engines[self._bind]
        return sync_side(found)

    def _is_elsewhere(self, engine: Engine) -> bool:
        own = sync_side(self.engine)
        if engine is own:
            return False
        if any(engine is sync_side(known.engine) for known in self._engines().values()):
            return _place(engine) != _place(own)
        # One engine may reach the database past the other's pooler.
        return engine.url.database != own.url.database


def _sync(session: Session | AsyncSession) -> Session:
    return session.sync_session if isinstance(session, AsyncSession) else session


def _place(engine: Engine | AsyncEngine) -> str:
    """Say which database it is, with no password."""
    host = engine.url.host or engine.url.query.get("host") or ""
    port = engine.url.port or engine.url.query.get("port") or ""
    return f"{engine.url.database!r} on {host}{port and f':{port}'}" if host else repr(engine.url.database)
