"""The messages between a worker and its child processes."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec


class Setup(msgspec.Struct, tag=True):
    """The first message to a child."""

    engine: dict[str, Any] | None
    """The settings of its engine, as of `settings_of`."""
    make_engine: str | None
    """The path of the function that makes its engine instead."""
    problem: str
    """Why it can have no engine."""
    log_level: int
    """The level of the worker's root logger."""


class Run(msgspec.Struct, tag=True):
    """Run an attempt."""

    function: str
    """The path of the function."""
    middleware: list[str]
    """The paths of the middleware, the outermost first."""
    max_result_size: int | None
    """None: what the function returns is ignored."""
    row: list[Any]
    """The claimed row, without data and timeout."""
    data: str
    """The task's data as JSON."""
    schema: str | None
    max_data_size: int
    keeps_completed: bool
    trace: str | None
    """The `meta` in which the current span is written, as JSON."""


class Stop(msgspec.Struct, tag=True):
    """Set `task.should_stop`."""


class End(msgspec.Struct, tag=True):
    """Raise `Interrupted` in the task, and exit afterwards."""


class MayComplete(msgspec.Struct, tag=True):
    """Whether the task may be completed; the reply to `Completing`."""

    is_allowed: bool


class Begun(msgspec.Struct, tag=True):
    """The function has been imported, and is about to be called."""


class Progress(msgspec.Struct, tag=True):
    """The function has reported progress."""

    done: float
    total: float | None
    note: str


class Raised(msgspec.Struct):
    """An error."""

    report: dict[str, str]
    """Its class, message and traceback, as of `report`."""
    module: str
    """The module of its class."""


class Logged(msgspec.Struct, tag=True):
    """A record of the log."""

    name: str
    level: int
    text: str
    error: Raised | None
    created: float
    process: int | None
    path: str
    line: int
    function: str | None
    thread: str | None


class Completing(msgspec.Struct, tag=True):
    """The function has returned, and its session is about to be committed."""


class Ended(msgspec.Struct, tag=True):
    """The attempt has ended."""

    outcome: str = "completed"
    """Or the name of an `Outcome`, or "error"."""
    delay: float | None = None
    error: Raised | None = None
    is_caused: bool = False
    """Whether it is the error from which `Retry` or `Fail` was raised."""
    result: str | None = None
    is_committed: bool = False
    """Whether the completion was committed with the session."""
    is_followed: bool = False
    """Whether other tasks wait for this one; known if it was committed."""


ToChild = Setup | Run | Stop | End | MayComplete
FromChild = Begun | Progress | Logged | Completing | Ended

# Not as JSON, which has no infinite numbers: a task may be due at any time that PostgreSQL knows.
_encoder: Final = msgspec.msgpack.Encoder()
_to_child: Final = msgspec.msgpack.Decoder(ToChild)
_from_child: Final = msgspec.msgpack.Decoder(FromChild)


def send(connection: Connection, message: ToChild | FromChild) -> None:
    """Send a message; OSError if the other process has ended."""
    connection.send_bytes(_encoder.encode(message))


def receive_in_child(connection: Connection) -> ToChild:
    """Wait for the next message of the worker; EOFError or OSError if it has ended."""
    return _to_child.decode(connection.recv_bytes())


def receive(connection: Connection, timeout: float) -> FromChild | None:
    """Return the next message of a child, or None after `timeout`; EOFError or OSError if it has ended."""
    if not connection.poll(timeout):
        return None
    return _from_child.decode(connection.recv_bytes())
