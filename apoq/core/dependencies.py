"""Options of a task that waits for others, checked before any statement is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, NamedTuple

from apoq.core.outcomes import ParentFailed
from apoq.errors import InvalidTask, glimpse

OnParentFailure = Literal["cancel", "run", "hold"]

CANCEL: Final = "cancel"
RUN: Final = "run"
HOLD: Final = "hold"

MAX_PARENTS: Final = 1_000
"""Tasks that can be in `after`, at most."""

MAX_MEMBERS: Final = 100_000
"""Tasks of a group, at most."""

ERROR_CLASS: Final = ParentFailed.__name__
"""The class in the error of a task that was cancelled because one of its parents has not completed."""


class Dependencies(NamedTuple):
    """The tasks that a task waits for, and what happens if one of them doesn't complete."""

    parents: tuple[int, ...] = ()
    on_failure: OnParentFailure | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of a statement that adds a task without parents; NULL stands for the default."""
        return {
            "task_blockers": len(self.parents),
            "task_on_parent_failure": None if self.on_failure == CANCEL else self.on_failure,
            "task_group_id": None,
            "task_is_followed": None,
        }


def checked_dependencies(
    after: object, on_parent_failure: object, id_of: Callable[[Any], int]
) -> Dependencies | None:
    """Return what a task waits for, or None if `after` is empty; `InvalidTask` if it can't wait for that."""
    on_failure = checked_on_failure(on_parent_failure)
    if isinstance(after, str | bytes) or not isinstance(after, Iterable):
        raise InvalidTask(
            f"after must be a list of tasks or ids, got {glimpse(after)}: write after=[task] for one task"
        )
    parents = tuple(dict.fromkeys(map(id_of, after)))
    if len(parents) > MAX_PARENTS:
        raise InvalidTask(
            f"after must have at most {MAX_PARENTS:,} tasks, got {len(parents):,}: use queue.group, or let "
            "the task wait for tasks that wait for a part of them"
        )
    if not parents:
        return None
    return Dependencies(parents, on_failure)


def checked_on_failure(value: object) -> OnParentFailure | None:
    """Return what happens to a task if a parent doesn't complete; `InvalidTask` if it is not a choice."""
    match value:
        case None | "cancel" | "run" | "hold":
            return value
    raise InvalidTask(f"on_parent_failure must be 'cancel', 'run' or 'hold', got {glimpse(value)}")
