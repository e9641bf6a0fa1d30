"""Messages about a first argument that is not a session or a connection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from apoq.errors import glimpse

_TAKEN: Final = "a session or a connection of SQLAlchemy's, or a connection of psycopg 3's"
_BEGIN: Final = "`with Session(engine) as session, session.begin(): queue.add(session, …)`"

_MOCK: Final = (
    "session must not be a mock, through which nothing can be added: pass a real one, whose transaction your "
    "test rolls back, and look for the task with `apoq.testing.enqueued`"
)

_INSTEAD: Final = {
    "flask_sqlalchemy": "pass its session, `db.session`",
    "flask_sqlalchemy_lite": "pass its session, `db.session` or `db.async_session`",
    "psycopg2": "apoq uses psycopg 3",
    "asyncpg": "apoq uses psycopg 3, also with asyncio",
    "sqlite3": "apoq needs PostgreSQL",
    "contextlib": "enter it with `with` or `async with`, and pass the result",
    "django": "pass `connection.connection`, inside `transaction.atomic()`",
    "sqlalchemy": f"begin a session: {_BEGIN}",
    "psycopg": f"begin a session: {_BEGIN}",
    "psycopg_pool": "pass a connection of the pool: `with pool.connection() as connection:`",
}
"""Advice by the package of the class."""

_MAKERS: Final = {"sessionmaker", "async_sessionmaker"}


def is_mock(value: object) -> bool:
    """Return whether a value is a mock, for which isinstance can return True with any class."""
    return type(value).__module__ == "unittest.mock"


def is_mistaken(given: object) -> bool:
    """Return whether a value looks like a mistaken session or connection, and not like an argument."""
    return (
        given is None
        or is_mock(given)
        or isinstance(given, type)
        or type(given).__module__.partition(".")[0] in _INSTEAD
        or (isinstance(given, str) and given.startswith("postgres"))
    )


def refusal(given: object) -> str:
    """Return the message for something that is not a session or a connection."""
    if is_mock(given):
        return _MOCK
    return f"session must be {_TAKEN}, got {kind_of(given)}: {instead_of(given)}"


def shown_arguments(args: Iterable[object], kwargs: Mapping[str, object]) -> str:
    """Return the arguments of a call, as a message shows them."""
    return ", ".join([*map(glimpse, args), *(f"{name}={glimpse(value)}" for name, value in kwargs.items())])


def forgotten(call: str) -> str:
    """Return the message for a call without a session; `call` is the right one."""
    return f"the first argument must be a session or a connection: did you mean `{call}`?"


def instead_of(given: object) -> str:
    """Return what to pass instead of something that is not a session."""
    kind = type(given)
    if isinstance(given, type) or kind.__name__ in _MAKERS:
        return f"call it, and pass the result: {_BEGIN}"
    if given is None:
        return (
            f"begin a session: {_BEGIN}; Django's `connection.connection` is None outside "
            "`transaction.atomic()`"
        )
    return _INSTEAD.get(kind.__module__.partition(".")[0], f"begin a session: {_BEGIN}")


def kind_of(value: object) -> str:
    """Return the name of a value's class, or of a class; not the value, because a URL contains a password."""
    kind = value if isinstance(value, type) else type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"the class {name}" if isinstance(value, type) else name
