"""Executes statements through what psycopg puts around libpq, past its cursors.

A cursor serves everybody: it finds out what each value is, whether to prepare, and what to make of a row. For
apoq's own statements, few and always the same, all that is known; and after a pause of 20 ms a cursor takes a
third of the time in which an idle worker claims a task.
"""

from __future__ import annotations

import codecs
import hashlib
import selectors
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from typing import Any, Final, cast

import psycopg
from psycopg import generators
from psycopg._encodings import pg2pyenc
from psycopg.abc import PQGen
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, ExecStatus, Format
from psycopg.pq.abc import PGresult
from psycopg.waiting import Wait
from sqlalchemy import Executable
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from apoq.postgres.watchdog import watch

_dialect = PGDialect_psycopg(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]

_NAMED: Final = "apoq.named"
"""How characters are encoded that an encoding doesn't have: as their names, which JSON can hold, too."""

PROGRESS_INTERVAL_SECONDS: Final = 0.1
"""Seconds after which it is noted that more of an answer has arrived: an answer may have many parts."""

_ANSWERS: Final = {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK}


class Answer:
    """What the server has answered; its rows are read when they are asked for, wherever the connection is."""

    def __init__(self, connection: psycopg.Connection[Any], result: PGresult) -> None:
        self._result = result
        self._transformer = Transformer(connection)
        self._transformer.set_pgresult(result)

    @property
    def rowcount(self) -> int:
        """How many rows were read, or written to."""
        return self._result.command_tuples or 0

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Answer the rows."""
        return self._transformer.load_rows(0, self._result.ntuples, tuple)

    def mappings(self) -> list[dict[str, Any]]:
        """Answer the rows, with their columns' names."""
        names = [cast("bytes", self._result.fname(at)).decode() for at in range(self._result.nfields)]
        return [dict(zip(names, row, strict=True)) for row in self.fetchall()]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.fetchall())


def execute(
    connection: psycopg.Connection[Any],
    statement: Executable,
    parameters: Mapping[str, Any],
    *,
    prepared: set[bytes] | None,
) -> Answer:
    """Execute a Core statement on a connection; answer what the server has answered.

    `prepared`: the names of what the session has prepared, to which this statement's is added; None where
    nothing may be kept in it. Raises psycopg's errors.
    """
    name = None if prepared is None else prepare(connection, statement, prepared)
    send(connection, statement, parameters, name)
    return Answer(connection, _answer(connection))


def prepare(connection: psycopg.Connection[Any], statement: Executable, prepared: set[bytes]) -> bytes:
    """Prepare a Core statement, unless it is among those that are `prepared`; answer its name."""
    name = _name(statement)
    if name not in prepared:
        connection.pgconn.send_prepare(name, _text(statement))
        _answer(connection)
        prepared.add(name)
    return name


def send(
    connection: psycopg.Connection[Any],
    statement: Executable,
    parameters: Mapping[str, Any],
    name: bytes | None,
) -> None:
    """Send a Core statement, by its name where it is prepared, and don't wait for the answer."""
    pgconn = connection.pgconn
    values = _values(connection, statement, parameters)
    # Binary is read in less time than text, and whatever the session's DateStyle is.
    if name is None:
        pgconn.send_query_params(_text(statement), values, result_format=Format.BINARY)
    else:
        pgconn.send_query_prepared(name, values, result_format=Format.BINARY)


def _values(
    connection: psycopg.Connection[Any], statement: Executable, parameters: Mapping[str, Any]
) -> list[bytes | None]:
    """Answer a statement's values as the server reads them, in the order of its `$1`."""
    _, names, constants = _compiled(statement)
    given = [parameters[name] if name in parameters else constants[name] for name in names]
    # Encoded together, for each by itself takes longer; apart again by what PostgreSQL's text can't hold.
    text = "\0".join([value if type(value) is str else _written(value) for value in given])
    encoded = text.encode() if text.isascii() else _encoded(connection, text)
    values = encoded.split(b"\0") if names else []
    if len(values) != len(given):
        raise psycopg.DataError("PostgreSQL's text can't hold a NUL (0x00)")  # libpq would end there
    return [None if value is None else its for value, its in zip(given, values, strict=True)]


def written(values: Mapping[str, Any]) -> dict[str, str]:
    """Write values ahead, as PostgreSQL reads them: for a statement on whose execution a task waits."""
    return {name: value if type(value) is str else _written(value) for name, value in values.items()}


def _written(value: object) -> str:
    """Write a value as PostgreSQL reads it; the driver takes ten times as long to find out what it is."""
    match value:
        case bool():
            return "t" if value else "f"
        case list():
            return f"{{{','.join(map(_element, value))}}}"
        case timedelta():
            return f"{value.days} days {value.seconds}.{value.microseconds:06} seconds"
        case _:
            return str(value)


def _element(value: object) -> str:
    if value is None:
        return "NULL"
    return '"' + _written(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _encoded(connection: psycopg.Connection[Any], text: str) -> bytes:
    """Encode text; raise `DataError` if it can't be.

    What the database's own encoding can't hold is named instead: the server would refuse an error's text for
    one character. A queue or a type of such a name can't exist there, and by the other name isn't found.
    """
    try:
        if codec := _codec(connection.pgconn.parameter_status(b"server_encoding")):
            text = text.encode(codec, _NAMED).decode(codec)
        return text.encode()  # apoq's own connections are UTF-8
    except UnicodeEncodeError as error:
        raise psycopg.DataError(f"text can't be encoded: {error}") from None


@cache
def _codec(encoding: bytes | None) -> str | None:
    """Return Python's codec of a database's encoding; None if that takes any text, or Python has none."""
    if encoding is None or encoding == b"UTF8":
        return None
    try:
        return pg2pyenc(encoding)
    except psycopg.NotSupportedError:
        return None


def _name_characters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    named = [f"<U+{ord(character):04X}>" for character in error.object[error.start : error.end]]
    return "".join(named), error.end


codecs.register_error(_NAMED, _name_characters)


def _answer(connection: psycopg.Connection[Any]) -> PGresult:
    """Wait for the answer to what was sent."""
    result: PGresult = connection.wait(_answering(connection))[-1]
    check(connection, result)
    return result


def _answering(connection: psycopg.Connection[Any]) -> PQGen[list[PGresult]]:
    """Take an answer as it arrives, and note its progress: an answer that is long isn't overdue."""
    answering = generators.execute(connection.pgconn)
    next_note = time.monotonic() + PROGRESS_INTERVAL_SECONDS
    try:
        ready = yield next(answering)
        while True:
            awaited = answering.send(ready)  # a short answer ends here
            ready = yield awaited
            if time.monotonic() > next_note:
                next_note = time.monotonic() + PROGRESS_INTERVAL_SECONDS
                if _is_ready(connection, awaited):
                    watch.note_progress(connection)
    except StopIteration as end:
        results: list[PGresult] = end.value
        return results


def _is_ready(connection: psycopg.Connection[Any], awaited: Wait) -> bool:
    """Tell whether there is something to read, or room to write: psycopg 3.2 says so each time it looks."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, awaited)
        return bool(selector.select(0))


def check(connection: psycopg.Connection[Any], result: PGresult) -> None:
    """Raise the server's error, where that is its answer."""
    if result.status not in _ANSWERS:
        if connection.pgconn.status == ConnStatus.BAD:
            raise psycopg.OperationalError(result.get_error_message())
        raise error_from_result(result, connection.info.encoding)


def _text(statement: Executable) -> bytes:
    return _compiled(statement)[0].encode()


@cache
def _name(statement: Executable) -> bytes:
    """Answer a name by which a statement can be prepared.

    By what it says: should a pooler hand the session to another worker, of whatever version, the same name is
    the same statement there.
    """
    return b"apoq_" + hashlib.sha256(_text(statement)).hexdigest()[:16].encode()


@cache
def _compiled(statement: Executable) -> tuple[str, list[str], dict[str, Any]]:
    # With the server's own $1: with names, they would have to be found in the text, each time.
    found: Any = cast("Any", statement).compile(dialect=_dialect)
    return str(found), found.positiontup or [], found.params
