"""Test helper for Flask applications: rolls back everything that a test commits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from flask import Flask
from sqlalchemy import URL, Connection, Engine
from sqlalchemy.orm import sessionmaker

from apoq.errors import ApoqError, UnsupportedSession, glimpse


@contextmanager
def rolled_back(app: Flask) -> Iterator[Any]:
    """Enter an application context whose commits are rolled back after the ``with`` block.

    During the block, all engines of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite, including those of the binds,
    are replaced by connections whose transactions are rolled back. Each request of a test client has its own
    application context and session, as in production, so its uncommitted changes are lost after it.

    Create your tables before the block, for example in a fixture of the application.

    Args:
        app: The application.

    Yields:
        The `db.session` of the test's application context.

    Raises:
        TypeError: If `app` is not a Flask application.
        ApoqError: If it has neither of the two extensions.
        UnsupportedSession: If it has asyncio engines.
    """
    if not isinstance(app, Flask):
        raise TypeError(f"app must be a Flask application, got {glimpse(app)}")
    db = app.extensions.get("sqlalchemy")
    if db is None:
        raise ApoqError(
            f"the application {app.name!r} must have Flask-SQLAlchemy or Flask-SQLAlchemy-Lite: otherwise "
            "use apoq.testing.rolled_back(engine), and bind your own session to its connection"
        )
    with app.app_context():
        if getattr(db, "async_engines", None):
            raise UnsupportedSession(
                "asyncio engines can't be rolled back here, because each async view has another event loop: "
                "test with SQLALCHEMY_ENGINES, or on a database that you drop"
            )
        with ExitStack() as stack:
            _replace_engines(db, stack)
            stack.enter_context(_context_per_request(app))
            # Its exit closes the session, before the transaction is rolled back.
            stack.enter_context(app.app_context())
            yield db.session


def _replace_engines(db: Any, stack: ExitStack) -> None:
    connections: dict[URL, Connection] = {}

    def connect(engine: Engine) -> Connection:
        if engine.url not in connections:  # two binds of one database share a connection
            connections[engine.url] = connection = stack.enter_context(engine.connect())
            stack.callback(connection.begin().rollback)
            connection.begin_nested()  # sessions then commit into a savepoint of their own
        return connections[engine.url]

    engines: dict[Any, Engine] = dict(db.engines)
    stack.callback(db.engines.update, engines)
    db.engines.update({name: connect(engine) for name, engine in engines.items()})
    make = db.sessionmaker
    if isinstance(make, sessionmaker):  # Flask-SQLAlchemy-Lite, whose sessions don't look up `db.engines`
        bind, binds = make.kw["bind"], make.kw.get("binds")
        stack.callback(make.configure, bind=bind, binds=binds)
        make.configure(
            bind=connect(bind), binds={mapped: connect(engine) for mapped, engine in (binds or {}).items()}
        )


@contextmanager
def _context_per_request(app: Flask) -> Iterator[None]:
    # Flask pushes no context for a request if the same application already has one, which is the test's.
    serve = app.wsgi_app

    def serve_in_context(environ: Any, start_response: Any) -> Any:
        with app.app_context():
            return serve(environ, start_response)

    app.wsgi_app = serve_in_context  # type: ignore[method-assign]
    try:
        yield
    finally:
        app.wsgi_app = serve  # type: ignore[method-assign]
