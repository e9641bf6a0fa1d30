"""Tasks that are added when other tasks fail for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from apoq.core.limits import ConcurrencyKey
from apoq.core.options import checked
from apoq.core.payload import check_type
from apoq.errors import InvalidProcessor, InvalidTask, glimpse


@dataclass(frozen=True, slots=True)
class TaskFailure:
    """A task that has failed for good: the argument of the tasks that ``on_failure`` adds.

    Attributes:
        task_id (int): The id of the failed task.
        type (str): Its type.
        queue (str): The name of its queue.
        attempt (int): The number of its last attempt.
        error_class (str): The class of its last error, such as ``"ConnectionError"``.
        message (str): The message of its last error.
    """

    task_id: int
    type: str
    queue: str
    attempt: int
    error_class: str
    message: str


@dataclass(frozen=True, slots=True)
class FollowUp:
    """The task that is added when a task fails for good."""

    type: str
    queue: str | None
    """The name of its queue, in the schema of the failed task; None for the failed task's queue."""
    parameters: Mapping[str, Any]
    """Its options, as parameters of a statement."""
    data: Callable[[TaskFailure], dict[str, Any]]
    """Returns its data."""
    key: ConcurrencyKey | None = None


class FollowUpTask(Protocol):
    """A typed task that can be added when another one fails."""

    def follow_up(self) -> FollowUp:
        """Return how it is added; `InvalidProcessor` if it can't be."""


OnFailure = str | FollowUpTask
"""A typed task, or the type of a task in the queue of the failed one."""


def follow_up(on_failure: OnFailure | None, type_: str) -> FollowUp | None:
    """Return what is added when tasks of a type fail; `InvalidProcessor` if that is invalid."""
    if on_failure is None:
        return None
    if isinstance(on_failure, str):
        try:
            its = FollowUp(check_type(on_failure), None, checked(), asdict)
        except InvalidTask as error:
            raise InvalidProcessor(f"on_failure: {error}") from None
    elif callable(getattr(on_failure, "follow_up", None)):
        its = on_failure.follow_up()
    else:
        raise InvalidProcessor(
            f"on_failure must be a typed task, or the type of a task, got {glimpse(on_failure)}"
        )
    if its.type == type_:
        raise InvalidProcessor(
            f"on_failure must be another task than the one that fails, got {type_!r}: it would add itself "
            "again and again"
        )
    return its
