"""What to say of something that a task can't be added through."""

from __future__ import annotations

from typing import Final

_TAKEN: Final = (
    "SQLAlchemy's Session, scoped_session, AsyncSession, Connection or AsyncConnection, or psycopg 3's "
    "Connection or AsyncConnection"
)
_BEGIN: Final = "`with Session(engine) as session, session.begin(): queue.add(session, …)`"

_MOCK: Final = (
    "nothing can be added through a mock of a session or a connection: give a real one, whose transaction "
    "your test rolls back, and look for the task by `apoq.testing.enqueued`"
)

_INSTEAD: Final = {
    "flask_sqlalchemy": "give its session, `db.session`",
    "flask_sqlalchemy_lite": "give its session, `db.session` or `db.async_session`",
    "psycopg2": "apoq works through psycopg 3",
    "asyncpg": "apoq works through psycopg 3, also with asyncio",
    "sqlite3": "apoq works on PostgreSQL",
    "contextlib": "enter it by `with` or `async with`, and give what that gives you",
    "django": "give `connection.connection`, inside `transaction.atomic()`",
}
"""By the package of the class."""

_MAKERS: Final = {"sessionmaker", "async_sessionmaker"}


def is_mock(value: object) -> bool:
    """Tell whether it is a mock, which says that it is what it mocks."""
    return type(value).__module__ == "unittest.mock"


def refusal(given: object) -> str:
    """Say what to give instead of something that isn't a session or a connection."""
    if is_mock(given):
        return _MOCK
    return (
        "a task is added through a session or a connection, in your transaction, not through "
        f"{kind_of(given)}: {instead_of(given)}. It may be {_TAKEN}"
    )


def instead_of(given: object) -> str:
    """Say what to do about something that is no session."""
    kind = type(given)
    if isinstance(given, type) or kind.__name__ in _MAKERS:
        return f"call it, and give what it makes: {_BEGIN}"
    if isinstance(given, str) and "://" not in given:
        return 'the session comes first, as in `queue.add(session, "send_welcome", …)`'
    if given is None:
        return f"begin one: {_BEGIN}; Django's `connection.connection` is there inside `transaction.atomic()`"
    return _INSTEAD.get(kind.__module__.partition(".")[0], f"begin one: {_BEGIN}")


def kind_of(value: object) -> str:
    """Name the class of a value, or a class; not the value, for a URL holds a password."""
    kind = value if isinstance(value, type) else type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"the class {name}" if isinstance(value, type) else name
