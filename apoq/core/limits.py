"""Limits on how many tasks run at once, and the keys by which tasks are limited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from apoq.core.payload import check_name
from apoq.core.plain import plain_number
from apoq.errors import InvalidLimit, InvalidTask, glimpse

ConcurrencyKey = str | int | Callable[[Any], "str | int | None"]
"""A key, or a function that returns the key for a task's data, or None for a task without a key."""

Order = Literal["due", "strict"]
AfterFailure = Literal["continue", "hold"]

MAX_OF_KEY: Final = 1_000
"""Tasks of one key that may run at once, at most."""

MAX_OF_POOL: Final = 10_000
"""Tasks of one type, or of one queue, that may run at once, at most."""

_KEY: Final = "a concurrency key"


@dataclass(frozen=True)
class Limit:
    """How many tasks may run at once, over all workers: of a type, of a queue, or of one key.

    `Limit(5)` is a limit of a whole type or queue. With a `key`, it is a limit for each key: `Limit(1,
    key=…)` runs the tasks of a key one after the other.

    Args:
        at_most: The number of tasks that may run at once: 0 to 1,000 for each key, 0 to 10,000 for a type or
            a queue. With 0, none begins.
        key: A function that takes the arguments of a typed task as keywords, and returns the task's key: text
            or a whole number, or None for a task without a limit. Or True: the callers pass ``key=`` when
            they add tasks.
        order: ``"due"``: the task of a key with the highest priority that has been due for the longest time
            begins next, and others run while one waits to be retried. ``"strict"``: the tasks of a key run in
            the order in which they were added, and none begins before the one before it has ended, with all
            its retries. It needs a key and ``at_most=1``.
        after_failure: With ``order="strict"``: whether the next task of the key begins after one has failed
            for good (``"continue"``), or the key waits until that task is retried or deleted (``"hold"``).

    Raises:
        InvalidLimit: If an argument is invalid.
    """

    at_most: int
    key: Callable[..., str | int | None] | Literal[True] | None = None
    order: Order = "due"
    after_failure: AfterFailure = "continue"

    def __post_init__(self) -> None:
        check_at_most(self.at_most, is_of_key=self.key is not None)
        if self.key is not None and self.key is not True and not callable(self.key):
            raise InvalidLimit(
                "key must be a function that takes the task's arguments and returns a key, or True if the "
                f"callers pass key=, got {glimpse(self.key)}"
            )
        _check_one_of("order", self.order, ("due", "strict"))
        _check_one_of("after_failure", self.after_failure, ("continue", "hold"))
        if self.order == "strict" and (self.at_most != 1 or self.key is None):
            raise InvalidLimit('order="strict" needs a key and at_most=1: Limit(1, key=…, order="strict")')
        if self.after_failure == "hold" and self.order != "strict":
            raise InvalidLimit(
                'after_failure="hold" needs order="strict", which has one task after the other'
            )

    @property
    def is_of_key(self) -> bool:
        """Whether it limits the tasks of each key, and not all tasks of a type or queue together."""
        return self.key is not None

    @property
    def of_given_keys(self) -> Limit:
        """The same limit, for a processor: the function for the key is needed only when tasks are added."""
        return replace(self, key=True) if callable(self.key) else self

    def key_of(self, arguments: dict[str, Any]) -> str | None:
        """Return the key of a typed task with these arguments; `InvalidTask` if it can't be one."""
        return checked_key(self.key(**arguments)) if callable(self.key) else None


def checked_limit(value: object) -> Limit | None:
    """Return a limit that was given as an option; `InvalidLimit` if it is none."""
    if value is not None and not isinstance(value, Limit):
        raise InvalidLimit(f"limit must be a Limit, such as Limit(2), got {glimpse(value)}")
    return value


def whole_limit(value: object) -> Limit | None:
    """Return the limit of a whole queue; `InvalidLimit` if it is invalid, or a limit of each key."""
    limit = checked_limit(value)
    if limit is not None and limit.is_of_key:
        raise InvalidLimit(
            "the limit of a queue must have no key: give @queue.task(limit=…) the limit of each key"
        )
    return limit


def check_at_most(value: object, *, is_of_key: bool) -> int:
    """Return the number of a limit; `InvalidLimit` if it is not a whole number within bounds."""
    most = MAX_OF_KEY if is_of_key else MAX_OF_POOL
    number = plain_number(value)
    if not isinstance(number, int) or not 0 <= number <= most:
        of = "each key" if is_of_key else "a type or a queue"
        raise InvalidLimit(
            f"at_most must be a whole number from 0 to {most:,} for {of}, got {glimpse(value)}"
        )
    return number


def checked_key(value: object, name: str = _KEY) -> str | None:
    """Return a concurrency key as text, or None; `InvalidTask` if it can't be one."""
    if value is None:
        return None
    number = plain_number(value)
    if isinstance(number, int):
        return str(number)
    if not isinstance(value, str):
        raise InvalidTask(f"{name} must be text, a whole number or None, got {glimpse(value)}")
    return check_name(value, name)


def key_for(key: ConcurrencyKey | None, data: Any, name: str = _KEY) -> str | None:
    """Return the key of a task with this data, or None; `InvalidTask` if it can't be one."""
    return checked_key(key(data) if callable(key) else key, name)


def _check_one_of(name: str, value: object, allowed: tuple[str, str]) -> None:
    if value not in allowed:
        raise InvalidLimit(f"{name} must be {allowed[0]!r} or {allowed[1]!r}, got {glimpse(value)}")
