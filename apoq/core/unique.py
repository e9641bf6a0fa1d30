"""Options of a unique task, checked before any statement is sent."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from typing import Any, Final, Literal, NamedTuple

from apoq.core.payload import MAX_TYPE_LENGTH, check_name
from apoq.core.retry import duration
from apoq.errors import InvalidTask, glimpse

UniqueKey = str | Callable[[Any], str | None]
"""A key, or a function that returns the key for a task's data, or None for a task without a key."""
UniqueUntil = Literal["started", "ended"]
OnConflict = Literal["skip", "replace", "raise"]

STARTED: Final = "started"
ENDED: Final = "ended"
SKIP: Final = "skip"
REPLACE: Final = "replace"
RAISE: Final = "raise"

ADDED: Final = "added"
KEPT: Final = "kept"
REPLACED: Final = "replaced"
THROTTLED: Final = "throttled"
"""Outcomes of `add`: the task was added, or the one that has the key was kept or replaced, or neither."""

_KEY: Final = "a unique key"


def typed_key(type_: str, detail: str) -> str:
    """Return a key that only tasks of a type have; one that is too long is shortened by its hash."""
    key = f"{type_}:{detail}"
    if len(key) <= MAX_TYPE_LENGTH:
        return key
    digest = sha256(key.encode()).hexdigest()
    return f"{key[: MAX_TYPE_LENGTH - len(digest) - 1]}:{digest}"


class Unique(NamedTuple):
    """How tasks are unique."""

    key: UniqueKey
    until: UniqueUntil
    on_conflict: OnConflict
    max_wait: timedelta | None = None
    """For a debounced task: the time after which it is due at the latest, counted from its creation."""
    throttle: timedelta | None = None
    """The time in which no second task is added with the key, counted from the first one."""

    def key_of(self, data: Any, name: str = _KEY) -> str | None:
        """Return the key of a task with this data; `InvalidTask` if it can't be one."""
        key = self.key(data) if callable(self.key) else self.key
        return None if key is None else check_name(key, name)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of a statement, except for the key."""
        # None and not False, because a NULL takes less space.
        return {"unique_until_end": True if self.until == ENDED else None}


NOT_UNIQUE: Final[dict[str, Any]] = {"unique_until_end": None}
"""The parameters of a statement for tasks without a unique key."""


def checked_unique(
    unique_key: UniqueKey | None = None,
    unique_until: UniqueUntil | None = None,
    on_conflict: OnConflict | None = None,
    debounce: float | timedelta | None = None,
    max_wait: float | timedelta | None = None,
    throttle: float | timedelta | None = None,
) -> Unique | None:
    """Return how tasks with these options are unique, or None; `InvalidTask` if the options are invalid."""
    given = {
        "unique_until": unique_until,
        "on_conflict": on_conflict,
        "debounce": debounce,
        "max_wait": max_wait,
        "throttle": throttle,
    }
    if unique_key is None:
        for name, value in given.items():
            if value is not None:
                raise InvalidTask(
                    f"{name} must be given with a unique_key, got {name}={glimpse(value)} alone"
                )
        return None
    if not callable(unique_key):
        check_name(unique_key, _KEY)
    return Unique(
        unique_key,
        _one_of("unique_until", unique_until, (STARTED, ENDED)),
        _on_conflict(on_conflict, debounce),
        _max_wait(debounce, max_wait),
        _throttle(throttle, on_conflict=on_conflict, debounce=debounce),
    )


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    """Return the value, or the first of those that are allowed if it is None."""
    if value is not None and value not in allowed:
        listed = " or ".join((", ".join(map(repr, allowed[:-1])), repr(allowed[-1])))
        raise InvalidTask(f"{name} must be {listed}, got {glimpse(value)}")
    return value or allowed[0]


def _on_conflict(on_conflict: OnConflict | None, debounce: object) -> OnConflict:
    if debounce is not None and on_conflict is not None:
        raise InvalidTask(
            f"on_conflict must not be given with debounce, which implies it, got {glimpse(on_conflict)}"
        )
    checked: OnConflict = _one_of("on_conflict", on_conflict, (SKIP, REPLACE, RAISE))
    return REPLACE if debounce is not None else checked


def _throttle(throttle: float | timedelta | None, **excluded: object) -> timedelta | None:
    if throttle is None:
        return None
    for name, value in excluded.items():
        if value is not None:
            raise InvalidTask(
                f"{name} must not be given with throttle, which adds nothing while a task holds the key, got "
                f"{name}={glimpse(value)}"
            )
    try:
        window = duration(throttle, "throttle")
    except (TypeError, ValueError) as error:
        raise InvalidTask(str(error)) from None
    if not window:
        raise InvalidTask(f"throttle must be positive, got {glimpse(throttle)}")
    return window


def _max_wait(debounce: float | timedelta | None, max_wait: float | timedelta | None) -> timedelta | None:
    if max_wait is None:
        return None
    if debounce is None:
        raise InvalidTask(f"max_wait must be given with debounce, got max_wait={glimpse(max_wait)} alone")
    try:
        longest, each = duration(max_wait, "max_wait"), duration(debounce, "debounce")
    except (TypeError, ValueError) as error:
        raise InvalidTask(str(error)) from None
    if longest < each:
        raise InvalidTask(f"max_wait must not be less than debounce, {each}, got {longest}")
    return longest
