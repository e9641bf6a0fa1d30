"""Executes statements by psycopg's wrapper of libpq, without its cursors.

A cursor is general: it determines the type of each value, whether to prepare, and how to build a row. apoq
has few statements, which are always the same, so all of this is known. After a pause of 20 ms, a cursor takes
a third of the time in which an idle worker claims a task.
"""

from __future__ import annotations

import codecs
import hashlib
import selectors
import time
from collections.abc import Iterable, Iterator, Mapping
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
"""Error handler that replaces a character that an encoding doesn't have by its name, which JSON can hold."""

PROGRESS_INTERVAL_SECONDS: Final = 0.1
"""Seconds between two notes that more of a response has arrived: a response may have many parts."""

_SUCCESS: Final = {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK}


class Result:
    """The server's response; its rows are converted on access, even if the connection is in use again."""

    def __init__(self, connection: psycopg.Connection[Any], result: PGresult) -> None:
        self._result = result
        self._transformer = Transformer(connection)
        self._transformer.set_pgresult(result)

    @property
    def rowcount(self) -> int:
        """The number of rows that were read or written."""
        return self._result.command_tuples or 0

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the rows."""
        return self._transformer.load_rows(0, self._result.ntuples, tuple)

    def mappings(self) -> list[dict[str, Any]]:
        """Return the rows as dicts by the names of the columns."""
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
) -> Result:
    """Execute a Core statement on a connection and return the server's response.

    `prepared` has the names of the session's prepared statements, to which this statement's name is added;
    None if the session may keep nothing. Raises psycopg's errors.
    """
    name = None if prepared is None else prepare(connection, statement, prepared)
    send(connection, statement, parameters, name)
    return Result(connection, _fetch(connection))


def execute_together(
    connection: psycopg.Connection[Any],
    statements: Iterable[tuple[Executable, Mapping[str, Any]]],
    *,
    prepared: set[bytes],
    begins: bool = False,
    commits: bool = False,
) -> list[Result]:
    """Execute statements with their parameters in one round trip, and return the server's responses.

    `begins`, `commits`: before or after them, the transaction begins or is committed. If a statement fails,
    those after it are not executed. Raises psycopg's errors.
    """
    named = [
        (statement, parameters, prepare(connection, statement, prepared))
        for statement, parameters in statements
    ]
    pgconn = connection.pgconn
    pgconn.enter_pipeline_mode()
    # All at once: each time that this thread waits, it may have to wait for the interpreter's lock as well.
    if begins:
        pgconn.send_query_params(b"BEGIN", None)
    for each in named:
        send(connection, *each)
    if commits:
        pgconn.send_query_params(b"COMMIT", None)
    pgconn.pipeline_sync()
    connection.wait(generators.send(pgconn))
    # Each response, and one to the synchronization. After it, the connection is out of the pipeline mode even
    # if a statement has failed.
    count = begins + len(named) + commits
    results = [connection.wait(_receive_one(connection))[-1] for _ in range(count + 1)]
    pgconn.exit_pipeline_mode()
    for result in results[:count]:
        check(connection, result)
    return [Result(connection, result) for result in results[begins : begins + len(named)]]


def prepare(connection: psycopg.Connection[Any], statement: Executable, prepared: set[bytes]) -> bytes:
    """Prepare a Core statement unless it is among those that are `prepared`; return its name."""
    name = _name(statement)
    if name not in prepared:
        connection.pgconn.send_prepare(name, _text(statement))
        _fetch(connection)
        prepared.add(name)
    return name


def send(
    connection: psycopg.Connection[Any],
    statement: Executable,
    parameters: Mapping[str, Any],
    name: bytes | None,
) -> None:
    """Send a Core statement, by name if it is prepared, without waiting for the response."""
    pgconn = connection.pgconn
    values = _values(connection, statement, parameters)
    # Binary results are faster to read than text, and don't depend on the session's DateStyle.
    if name is None:
        pgconn.send_query_params(_text(statement), values, result_format=Format.BINARY)
    else:
        pgconn.send_query_prepared(name, values, result_format=Format.BINARY)


def _values(
    connection: psycopg.Connection[Any], statement: Executable, parameters: Mapping[str, Any]
) -> list[bytes | None]:
    """Return the values of a statement's parameters as the server reads them, in the order of `$1`, `$2`."""
    _, names, constants = _compiled(statement)
    given = [parameters[name] if name in parameters else constants[name] for name in names]
    # Encode all values in one call, which is faster, joined by NUL, which PostgreSQL's text can't contain.
    text = "\0".join([value if type(value) is str else _as_text(value) for value in given])
    encoded = text.encode() if text.isascii() else _encoded(connection, text)
    values = encoded.split(b"\0") if names else []
    if len(values) != len(given):
        raise psycopg.DataError("PostgreSQL's text can't hold a NUL (0x00)")  # libpq would truncate it there
    return [None if value is None else its for value, its in zip(given, values, strict=True)]


def written(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as text that PostgreSQL reads, in advance: later, a task waits for the statement."""
    return {name: value if type(value) is str else _as_text(value) for name, value in values.items()}


def _as_text(value: object) -> str:
    """Return a value as text that PostgreSQL reads; the driver takes ten times as long to find its type."""
    match value:
        case bool():
            return "t" if value else "f"
        case list():
            return _array(value)
        case timedelta():
            return f"{value.days} days {value.seconds}.{value.microseconds:06} seconds"
        case _:
            return str(value)


def _array(values: list[Any]) -> str:
    if len(values) > 1 and set(map(type, values)) == {str}:
        # All at once, because a claim under limits sends a thousand keys.
        joined = "\0".join(values)
        if joined.count("\0") == len(values) - 1:
            return '{"' + joined.replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","') + '"}'
    return f"{{{','.join(map(_element, values))}}}"


def _element(value: object) -> str:
    if value is None:
        return "NULL"
    return '"' + _as_text(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _encoded(connection: psycopg.Connection[Any], text: str) -> bytes:
    """Encode text; raise `DataError` if it can't be.

    A character that the database's own encoding can't hold is replaced by its name, or else the server would
    reject the whole text of an error. A queue or a type with such a character in its name can't exist there,
    and isn't found by the replaced name either.
    """
    try:
        if codec := _codec(connection.pgconn.parameter_status(b"server_encoding")):
            text = text.encode(codec, _NAMED).decode(codec)
        return text.encode()  # apoq's own connections are UTF-8
    except UnicodeEncodeError as error:
        raise psycopg.DataError(f"text can't be encoded: {error}") from None


@cache
def _codec(encoding: bytes | None) -> str | None:
    """Return Python's codec for a database's encoding; None if it can hold any text, or Python has none."""
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


def _fetch(connection: psycopg.Connection[Any]) -> PGresult:
    """Wait for the response to a statement that was sent."""
    result: PGresult = connection.wait(_receive(connection))[-1]
    check(connection, result)
    return result


def _receive(connection: psycopg.Connection[Any]) -> PQGen[list[PGresult]]:
    """Receive the response to a statement that is being sent."""
    return _noting_progress(connection, generators.execute(connection.pgconn))


def _receive_one(connection: psycopg.Connection[Any]) -> PQGen[list[PGresult]]:
    """Receive the next response of several."""
    return _noting_progress(connection, generators.fetch_many(connection.pgconn))


def _noting_progress(
    connection: psycopg.Connection[Any], receiving: PQGen[list[PGresult]]
) -> PQGen[list[PGresult]]:
    """Receive a response and note its progress, because a long response isn't overdue."""
    next_note = time.monotonic() + PROGRESS_INTERVAL_SECONDS
    try:
        ready = yield next(receiving)
        while True:
            awaited = receiving.send(ready)  # a short response ends here
            ready = yield awaited
            if time.monotonic() > next_note:
                next_note = time.monotonic() + PROGRESS_INTERVAL_SECONDS
                if _is_ready(connection, awaited):
                    watch.note_progress(connection)
    except StopIteration as end:
        results: list[PGresult] = end.value
        return results


def _is_ready(connection: psycopg.Connection[Any], awaited: Wait) -> bool:
    """Return whether the socket is really ready: psycopg 3.2 reports that after every wait."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, awaited)
        return bool(selector.select(0))


def check(connection: psycopg.Connection[Any], result: PGresult) -> None:
    """Raise the server's error if the response is one."""
    if result.status not in _SUCCESS:
        if connection.pgconn.status == ConnStatus.BAD:
            raise psycopg.OperationalError(result.get_error_message())
        raise error_from_result(result, connection.info.encoding)


def _text(statement: Executable) -> bytes:
    return _compiled(statement)[0].encode()


@cache
def _name(statement: Executable) -> bytes:
    """Return a name by which a statement can be prepared, made from the statement's text.

    If a pooler hands the session to another worker, even one of another version, the same name stands for the
    same statement there.
    """
    return b"apoq_" + hashlib.sha256(_text(statement)).hexdigest()[:16].encode()


@cache
def _compiled(statement: Executable) -> tuple[str, list[str], dict[str, Any]]:
    # With the server's own `$1`: named parameters would have to be found in the text at each execution.
    found: Any = cast("Any", statement).compile(dialect=_dialect)
    return str(found), found.positiontup or [], found.params
