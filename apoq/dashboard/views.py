"""Tasks and schedules as the pages show them, in words and times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

from apoq.core.states import CANCELLABLE, CANCELLED, COMPLETED, FAILED, FINAL, PENDING, RUNNING, WAITING
from apoq.dashboard.redaction import Redactor, Shown, cut, printable
from apoq.monitor.browse import READY, RETRYING, SCHEDULED
from apoq.monitor.tracebacks import FRAME, Frame, is_own, own_frame

WAITS_FOR: Final = {
    "key": "its key",
    "pool": "a limit",
    "parents": "other tasks",
    WAITING: "other tasks or a limit",
}
"""The reasons for which tasks wait."""


class Event(NamedTuple):
    """A moment in the life of a task."""

    name: str
    at: datetime
    note: str = ""


class Line(NamedTuple):
    """A line of a traceback."""

    text: str
    is_own: bool


class Error(NamedTuple):
    """The last error of a task."""

    error_class: str
    message: str
    frame: Frame | None
    """The innermost frame of the application's own code."""
    lines: list[Line]
    is_cut: bool


class Task:
    """A task of a list, or of its own page."""

    def __init__(self, row: Mapping[Any, Any], redactor: Redactor, now: datetime) -> None:
        self.row = row
        self.now = now
        self._redactor = redactor

    def __getattr__(self, name: str) -> Any:
        """Return a column of the task's row."""
        try:
            return self.row[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def shown_state(self) -> str:
        """The state as people call it."""
        if self.row["state"] != PENDING:
            return str(self.row["state"])
        if self.row["process_at"] <= self.now:
            return READY
        return RETRYING if self.row["fail_count"] else SCHEDULED

    @property
    def is_ended(self) -> bool:
        """Whether it has ended, so that it can be retried."""
        return self.row["state"] in FINAL

    @property
    def is_open(self) -> bool:
        """Whether it has not ended, so that it can be cancelled."""
        return self.row["state"] in CANCELLABLE

    @property
    def at(self) -> datetime | None:
        """The time that matters in its state."""
        match self.row["state"]:
            case "pending":
                return self._time("process_at")
            case "running":
                return self._time("claimed_at")
            case "completed":
                return self._time("completed_at")
            case "failed" | "cancelled":
                return self._time("cancelled_at") or self._time("failed_at") or self._time("process_at")
        return self._time("created_at")

    @property
    def at_what(self) -> str:
        """The event at that time."""
        state = self.row["state"]
        names = {PENDING: "due", RUNNING: "claimed", COMPLETED: "completed", FAILED: "failed"}
        return names.get(state, "cancelled" if state == CANCELLED else "added")

    @property
    def has_failed(self) -> bool:
        """Whether its error is more important than its data."""
        is_retried = self.row["state"] == PENDING and self.row["fail_count"] > 0
        return bool(self.row["state"] == FAILED or is_retried)

    @property
    def excerpt(self) -> Shown:
        """The beginning of its data."""
        return self._redactor.excerpt(self.row["type"], self.row["data"], self.row["data_size"])

    @property
    def shown_data(self) -> Shown:
        """Its data."""
        return self._redactor.data(self.row["type"], self.row["data"], self.row["data_size"])

    @property
    def shown_meta(self) -> Shown | None:
        """Its `meta`, if there is one."""
        size = self.row["meta_size"]
        return None if size is None else self._redactor.plain(self.row["meta"], size)

    @property
    def shown_result(self) -> Shown | None:
        """Its result, if it has one."""
        size = self.row["result_size"]
        return None if size is None else self._redactor.plain(self.row["result"], size)

    @property
    def shown_unique_key(self) -> str | None:
        """Its unique key, if it has one."""
        key = self.row["unique_key"]
        return None if key is None else self._redactor.key(key)

    @property
    def attempts(self) -> str:
        """How many attempts there were, of how many."""
        number = max(self.row["attempt"], self.row["fail_count"])
        limit = self.row["retry_limit"]
        if limit is None:
            limit = self._limit_of_error()
        return f"{number:,}" if limit is None else f"{number:,} of {max(0, limit) + 1:,}"

    @property
    def waits_for(self) -> str:
        """Why it waits."""
        if self.row["waiting_for"] == "parents" and (count := self.row.get("blockers")):
            return "another task" if count == 1 else f"{count:,} other tasks"
        return WAITS_FOR.get(self.row["waiting_for"] or WAITING, str(self.row["waiting_for"]))

    @property
    def events(self) -> list[Event]:
        """The moments of its life, in order."""
        names = {
            "created_at": "added",
            "tick_at": "tick of its schedule",
            "process_at": "next attempt due" if self.shown_state == RETRYING else "due",
            "waiting_since": "began to wait",
            "claimed_at": "claimed by a worker",
            "failed_at": "failed for good" if self.row["state"] == FAILED else "attempt failed",
            "completed_at": "completed",
            "cancelled_at": "cancelled",
        }
        found = [(at, name) for column, name in names.items() if (at := self._time(column)) is not None]
        # `sorted` keeps the order of events at the same time.
        return [Event(name, at, note) for (at, name), note in _with_notes(sorted(found, key=_first))]

    @property
    def shown_error(self) -> Error | None:
        """Its last error, if there was one."""
        error = self.row["error"]
        if not isinstance(error, dict):
            return None
        shown = cut(str(error.get("traceback") or "").rstrip())
        lines = shown.text.splitlines()
        frame = own_frame(lines) or own_frame(printable(str(error.get("traceback") or "")).splitlines())
        return Error(
            cut(str(error.get("class", "error"))).text,
            cut(str(error.get("message", ""))).text,
            frame,
            list(_marked(lines)),
            shown.is_cut,
        )

    def _time(self, column: str) -> datetime | None:
        at: datetime | None = self.row[column]
        return at

    def _limit_of_error(self) -> int | None:
        error = self.row.get("error")
        try:
            return int(error["retry_limit"]) if isinstance(error, dict) else None
        except (KeyError, TypeError, ValueError):
            return None


def _first(pair: tuple[datetime, str]) -> datetime:
    return pair[0]


def _with_notes(found: list[tuple[datetime, str]]) -> Iterator[tuple[tuple[datetime, str], str]]:
    """Add to each event how long it was after the one before."""
    before: datetime | None = None
    for at, name in found:
        yield (
            (at, name),
            "" if before is None or at == before else f"+{duration((at - before).total_seconds())}",
        )
        before = at


def _marked(lines: list[str]) -> Iterator[Line]:
    """Mark the frames of the application's own code, which are two lines each."""
    is_in_own = False
    for line in lines:
        if match := FRAME.match(line):
            is_in_own = is_own(match["file"])
        elif not line.startswith(("    ", " |")):
            is_in_own = False
        yield Line(line, is_in_own)


def duration(seconds: float) -> str:
    """Write how long something took, with two or three digits."""
    if seconds < 1:
        return f"{seconds * 1_000:.0f} ms"
    if seconds < 100:  # noqa: PLR2004 - three digits
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join([f"{number:,} {unit}" for number, unit in parts if number][:2])


def utc(at: datetime) -> str:
    """Write a time in UTC."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def every(row: Mapping[Any, Any]) -> str:
    """Write when the ticks of a schedule are."""
    length: timedelta | None = row["every"]
    return (
        f"{row['cron']} {row['timezone']}" if length is None else f"every {duration(length.total_seconds())}"
    )
