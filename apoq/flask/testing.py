"""For the tests of a Flask application: everything that it commits is rolled back after the test."""

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
    """Give `db.session` in an application context, and roll everything back after the ``with`` block.

    All engines of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite are replaced by connections whose transactions
    are rolled back, those of its binds as well. Each request of a test client has an application context,
    and so a session, of its own, as in production: what a request leaves uncommitted is gone after it.

    Create your tables before, in a fixture of the application.
    """
    if not isinstance(app, Flask):
        raise TypeError(f"rolled_back takes a Flask application, not {glimpse(app)}")
    db = app.extensions.get("sqlalchemy")
    if db is None:
        raise ApoqError(
            f"the application {app.name!r} has neither Flask-SQLAlchemy nor Flask-SQLAlchemy-Lite: use "
            "apoq.testing.rolled_back(engine), and let your own session use its connection"
        )
    with app.app_context():
        if getattr(db, "async_engines", None):
            raise UnsupportedSession(
                "asyncio engines can't be rolled back here, because each async view has an event loop of its "
                "own: test with SQLALCHEMY_ENGINES, or on a database that you drop"
            )
        with ExitStack() as stack:
            _replace_engines(db, stack)
            stack.enter_context(_context_of_its_own(app))
            # Its end closes the session, before the transaction is rolled back.
            stack.enter_context(app.app_context())
            yield db.session


def _replace_engines(db: Any, stack: ExitStack) -> None:
    connections: dict[URL, Connection] = {}

    def connect(engine: Engine) -> Connection:
        if engine.url not in connections:  # two binds of one database see the same
            connections[engine.url] = connection = stack.enter_context(engine.connect())
            stack.callback(connection.begin().rollback)
            connection.begin_nested()  # sessions that find a savepoint make their own, and commit into it
        return connections[engine.url]

    engines: dict[Any, Engine] = dict(db.engines)
    stack.callback(db.engines.update, engines)
    db.engines.update({name: connect(engine) for name, engine in engines.items()})
    make = db.sessionmaker
    if isinstance(make, sessionmaker):  # Flask-SQLAlchemy-Lite, whose sessions look for no engine there
        bind, binds = make.kw["bind"], make.kw.get("binds")
        stack.callback(make.configure, bind=bind, binds=binds)
        make.configure(
            bind=connect(bind), binds={mapped: connect(engine) for mapped, engine in (binds or {}).items()}
        )


@contextmanager
def _context_of_its_own(app: Flask) -> Iterator[None]:
    # Flask pushes none for a request if one of the same application is there already: that of the test.
    serve = app.wsgi_app

    def serve_in_context(environ: Any, start_response: Any) -> Any:
        with app.app_context():
            return serve(environ, start_response)

    app.wsgi_app = serve_in_context  # type: ignore[method-assign]
    try:
        yield
    finally:
        app.wsgi_app = serve  # type: ignore[method-assign]
