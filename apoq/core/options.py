"""Options of a new task, checked before any statement is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict, Unpack

from apoq.core.dependencies import OnParentFailure, checked_on_failure
from apoq.core.limits import ConcurrencyKey, checked_key
from apoq.core.payload import check_time, encode, text_fault
from apoq.core.plain import plain_number
from apoq.core.retry import duration, time_limit
from apoq.core.unique import REPLACE, OnConflict, Unique, UniqueKey, UniqueUntil, checked_unique
from apoq.errors import InvalidProcessor, InvalidTask, glimpse
from apoq.tracing import KEYS as TRACE_KEYS

HIGHEST_LIMIT = 2**31 - 2

MAX_META_SIZE = 4 * 1024
"""Maximum size of a task's `meta`, in bytes of JSON."""

MAX_REASON_LENGTH = 1_000
"""Maximum length of the reason of a pause or a cancellation, in characters."""

OWN_META = "apoq."
"""The beginning of the keys of `meta` that apoq writes."""

_LOWEST_PRIORITY, _HIGHEST_PRIORITY = -(2**15), 2**15 - 1


class PlainOptions(TypedDict, total=False):
    """Options of a new task without a unique key, in addition to its type and data."""

    delay: float | timedelta | None
    process_at: datetime | None
    priority: int
    retry_limit: int | None
    retry_delay: float | timedelta | None
    timeout: float | timedelta | None
    meta: Mapping[str, Any] | None
    expires_at: datetime | None
    expires_in: float | timedelta | None


class Options(PlainOptions, total=False):
    """Options of a new task, in addition to its type and data."""

    key: ConcurrencyKey | None
    after: Iterable[Any]
    on_parent_failure: OnParentFailure | None

    unique_key: UniqueKey | None
    unique_until: UniqueUntil | None
    on_conflict: OnConflict | None
    debounce: float | timedelta | None
    max_wait: float | timedelta | None
    throttle: float | timedelta | None


def unique_options(
    key_of: Callable[[Any], str | None],
    unique: object,
    unique_until: UniqueUntil | None,
    on_conflict: OnConflict | None,
) -> Options:
    """Return the options of a typed task that is unique by `key_of`; `InvalidProcessor` if invalid."""
    if not isinstance(unique, bool) and not callable(unique):
        raise InvalidProcessor(
            "unique must be True, or a function that takes the task's arguments and returns a key, got "
            f"{glimpse(unique)}: for one key for all calls, use task.using(unique_key=…)"
        )
    try:
        checked_unique(key_of if unique else None, unique_until, on_conflict)
    except InvalidTask as error:
        raise InvalidProcessor(str(error).replace("a unique_key", "unique=True")) from None
    options: Options = {"unique_key": key_of} if unique else {}
    if unique_until is not None:
        options["unique_until"] = unique_until
    if on_conflict is not None:
        options["on_conflict"] = on_conflict
    return options


def merged_options(before: Options, new: Options) -> Options:
    """Return options to which new ones are added, without those that don't fit the new ones."""
    kept = before.copy()
    if "after" in new and isinstance(new["after"], Iterator):
        new["after"] = tuple(new["after"])  # for each call
    if "unique_key" in new and new["unique_key"] is None:
        kept.pop("unique_until", None)
        kept.pop("on_conflict", None)
        kept.pop("debounce", None)
        kept.pop("max_wait", None)
        kept.pop("throttle", None)
    elif new.get("debounce") is not None:
        kept.pop("on_conflict", None)
        kept.pop("throttle", None)
    elif new.get("throttle") is not None:
        kept.pop("on_conflict", None)
        kept.pop("debounce", None)
        kept.pop("max_wait", None)
    if new.get("expires_at") is not None:
        kept.pop("expires_in", None)
    if new.get("expires_in") is not None:
        kept.pop("expires_at", None)
    return {**kept, **new}


def checked_options(
    *,
    unique_key: UniqueKey | None = None,
    unique_until: UniqueUntil | None = None,
    on_conflict: OnConflict | None = None,
    debounce: float | timedelta | None = None,
    max_wait: float | timedelta | None = None,
    throttle: float | timedelta | None = None,
    key: ConcurrencyKey | None = None,
    after: Iterable[Any] = (),
    on_parent_failure: OnParentFailure | None = None,
    **options: Unpack[PlainOptions],
) -> tuple[dict[str, Any], Unique | None]:
    """Return options as parameters of a statement, and how the task is unique.

    The parameters are without the `key`, which may be a function of the data. `InvalidTask` if a task can't
    have the options.
    """
    if not callable(key):
        checked_key(key)
    unique = checked_unique(unique_key, unique_until, on_conflict, debounce, max_wait, throttle)
    checked_on_failure(on_parent_failure)
    if unique is not None and after and (unique.on_conflict == REPLACE or unique.throttle is not None):
        raise InvalidTask(
            "after must not be given with on_conflict='replace', debounce or throttle: a task that is kept "
            "or replaced keeps the parents that it was added with"
        )
    if debounce is not None:
        for name, value in (("delay", options.get("delay")), ("process_at", options.get("process_at"))):
            if value is not None:
                raise InvalidTask(f"debounce and {name} can't both be given: pass one of them")
        checked_length(debounce, "debounce")
        options["delay"] = debounce
    return checked(**options), unique


def checked(
    delay: float | timedelta | None = None,
    process_at: datetime | None = None,
    priority: int = 0,
    retry_limit: int | None = None,
    retry_delay: float | timedelta | None = None,
    timeout: float | timedelta | None = None,
    meta: Mapping[str, Any] | None = None,
    expires_at: datetime | None = None,
    expires_in: float | timedelta | None = None,
) -> dict[str, Any]:
    """Return these options as parameters of a statement; `InvalidTask` if a task can't have them."""
    when = _when(delay, process_at)
    return {
        **when,
        **_expiry(expires_at, expires_in, when),
        "task_priority": integer("priority", priority, _LOWEST_PRIORITY, _HIGHEST_PRIORITY),
        "task_retry_limit": (
            None if retry_limit is None else integer("retry_limit", retry_limit, 0, HIGHEST_LIMIT)
        ),
        "task_retry_delay": None if retry_delay is None else checked_length(retry_delay, "retry_delay"),
        "task_timeout": None if timeout is None else _timeout(timeout),
        "task_meta": None if meta is None or meta == {} else _meta(meta),
    }


def pause_end(until: datetime | timedelta | float | None) -> dict[str, Any]:
    """Return the end of a pause, a time or a length, as parameters; `InvalidTask` if it is in the past."""
    if until is None:
        return {"until": None, "length": None}
    if not isinstance(until, datetime):
        length = checked_length(until, "until")
        if not length:
            raise InvalidTask(f"until must be a positive duration or a time, got {until!r}")
        return {"until": None, "length": length}
    if check_time(until, "until") <= datetime.now(UTC):
        raise InvalidTask(f"until must be in the future, got {until}")
    return {"until": until, "length": None}


def checked_reason(reason: object) -> str:
    """Return a reason for people; `InvalidTask` if it is not text that PostgreSQL can hold, or too long."""
    if not isinstance(reason, str):
        raise InvalidTask(f"reason must be text, got {glimpse(reason)}")
    if len(reason) > MAX_REASON_LENGTH:
        raise InvalidTask(f"reason must have at most {MAX_REASON_LENGTH:,} characters, got {len(reason):,}")
    if fault := text_fault(reason):
        raise InvalidTask(f"reason can't hold {fault}: {glimpse(reason)}")
    return reason


def integer(name: str, value: object, lowest: int, highest: int) -> int:
    """Return a whole number within bounds; `InvalidTask` if the value is not one."""
    number = plain_number(value)
    if not isinstance(number, int) or not lowest <= number <= highest:
        raise InvalidTask(f"{name} must be a whole number from {lowest} to {highest}, got {glimpse(value)}")
    return number


def _when(delay: float | timedelta | None, process_at: datetime | None) -> dict[str, Any]:
    if delay is not None and process_at is not None:
        raise InvalidTask("delay and process_at can't both be given: pass one of them")
    if process_at is not None:
        check_time(process_at)
    task_delay = None if delay is None else checked_length(delay, "delay")
    return {"task_delay": task_delay, "task_process_at": process_at}


def has_expiry(parameters: Mapping[str, Any]) -> bool:
    """Return whether parameters, as of `checked`, let a task expire."""
    return "task_expires_at" in parameters


def _expiry(
    expires_at: datetime | None, expires_in: float | timedelta | None, when: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters of a task that expires; none if it doesn't, so that they cost nothing."""
    if expires_at is None and expires_in is None:
        return {}
    if expires_at is not None and expires_in is not None:
        raise InvalidTask("expires_at and expires_in can't both be given: pass one of them")
    length = None if expires_in is None else checked_length(expires_in, "expires_in")
    if expires_at is not None:
        check_time(expires_at, "expires_at")
    elif not length:
        raise InvalidTask(f"expires_in must be positive, got {glimpse(expires_in)}")
    for expiry, due, names in (
        (expires_at, when["task_process_at"], ("expires_at", "process_at")),
        (length, when["task_delay"], ("expires_in", "delay")),
    ):
        if expiry is not None and due is not None and expiry <= due:
            raise InvalidTask(
                f"{names[0]} must be later than {names[1]}, when the task is due, got {expiry} and {due}"
            )
    return {"task_expires_at": expires_at, "task_expires_in": length}


def checked_length(value: float | timedelta, name: str) -> timedelta:
    """Return a length of time; `InvalidTask` if it can't be one."""
    try:
        return duration(value, name)
    except (TypeError, ValueError) as error:
        raise InvalidTask(str(error)) from None


def _meta(value: object) -> str:
    if not isinstance(value, Mapping):
        raise InvalidTask(f"meta must be a dict, such as {{'request_id': '…'}}, got {glimpse(value)}")
    for key in TRACE_KEYS:
        if key in value:
            raise InvalidTask(f"meta must not have the key {key!r}, which is reserved for tracing")
    for key in value:
        if isinstance(key, str) and key.startswith(OWN_META):
            raise InvalidTask(
                f"meta must not have the key {key!r}: keys that begin with {OWN_META} are apoq's"
            )
    return encode(dict(value), MAX_META_SIZE, "meta")


def _timeout(value: float | timedelta) -> timedelta:
    try:
        return time_limit(value)
    except (TypeError, ValueError) as error:
        raise InvalidTask(str(error)) from None
