"""Reads the results of tasks, for all kinds of sessions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeVar

from apoq.client.session_adapters import Caller
from apoq.core.states import CANCELLED, COMPLETED, FAILED, FINAL
from apoq.errors import InvalidTask, NoResult
from apoq.postgres.loaders import UnreadableData, read_json
from apoq.schema.statements.results import read_result

R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Result(Generic[R_co]):
    """The state of a task, with its result if it has completed, or its last error.

    Returned by `Queue.result`, `Queue.wait`, and the same methods of a typed task.

    Attributes:
        task_id: The task's id.
        state: The task's state, such as ``"pending"`` or ``"completed"``.
        error: The last failure as stored in `Task.error`, with the keys `class`, `message` and `traceback`;
            None if no attempt has failed.
    """

    task_id: int
    state: str
    error: dict[str, str] | None = None
    _stored: str | None = field(default=None, repr=False)
    _read: Callable[[Any], R_co] | None = field(default=None, repr=False, compare=False)

    @property
    def has_ended(self) -> bool:
        """Whether the task has completed, failed for good, or was cancelled."""
        return self.state in FINAL

    @property
    def value(self) -> R_co:
        """The value that the processor has returned.

        Through a typed task, it is converted by the function's return annotation. `Queue.result` returns it
        as JSON.

        Raises:
            NoResult: If the task hasn't completed, if its result isn't kept, or if the stored result doesn't
                fit the annotation.
        """
        if self.state != COMPLETED:
            raise NoResult(f"the task {self.task_id} has no result: {self._reason()}")
        if self._stored is None:
            raise NoResult(
                f"the task {self.task_id} has completed, but its result was not kept: pass keep_result=True "
                "to @queue.task or to worker.use"
            )
        try:
            document = read_json(self._stored)
        except UnreadableData as error:
            raise NoResult(f"the result of the task {self.task_id} can't be read: {error}") from None
        value: R_co = document if self._read is None else self._read(document)
        return value

    def _reason(self) -> str:
        error = self.error or {}
        said = f", with {error.get('class', 'an error')}: {error.get('message', '')}"
        if self.state == FAILED:
            return f"it has failed{said}"
        return "it was cancelled" if self.state == CANCELLED else f"it is {self.state}"


class Kind(NamedTuple):
    """How the results of a task are read."""

    read: Callable[[Any], Any] | None = None
    """Converts a result; None: it is returned as JSON."""
    types: Collection[str] | None = None
    """The types that the task may have; None: any."""


ANY: Final = Kind()


def result(
    caller: Caller, schema: str | None, parameters: dict[str, Any], kind: Kind = ANY
) -> Result[Any] | None:
    """Return the result of the task `task_id` of `from_queue`; None if there is no such task."""
    for row in caller.execute(read_result(schema), parameters):
        task_id = parameters["task_id"]
        if kind.types is not None and row["type"] not in kind.types:
            wanted = " or ".join(map(repr, kind.types))
            raise InvalidTask(f"task must be of the type {wanted}, got the task {task_id} of {row['type']!r}")
        return Result(task_id, row["state"], _error(row["error"]), row["result"], kind.read)
    return None


def _error(text: str | None) -> dict[str, str] | None:
    try:
        found = None if text is None else read_json(text)
    except UnreadableData:  # another program has written it
        return None
    return found if isinstance(found, dict) else None
