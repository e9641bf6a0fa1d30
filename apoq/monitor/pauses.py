"""Pauses, as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import sqlalchemy as sa

from apoq.monitor.formatting import clean, length
from apoq.schema.statements.pauses import ALL_TYPES, pauses

MAX_PAUSES: Final = 100
"""How many pauses are shown together."""


@dataclass
class Pause:
    """A pause of a queue, or of one type of its tasks."""

    queue: str
    type: str | None
    """None: all tasks of the queue."""
    paused_at: datetime
    paused_by: str
    reason: str
    resume_at: datetime | None
    paused_for: float
    """Seconds since it began."""
    resumes_in: float | None
    """Seconds until it ends by itself; None: never."""

    @property
    def subject(self) -> str:
        """The queue, or the type of tasks, in words."""
        name = repr(clean(self.queue))
        return f"queue {name}" if self.type is None else f"type {clean(self.type)!r} of queue {name}"

    def __str__(self) -> str:
        ends = "" if self.resumes_in is None else f", for another {length(self.resumes_in)}"
        reason = f": {clean(self.reason)}" if self.reason else ""
        began = f"paused {length(self.paused_for)} ago by {clean(self.paused_by)}"
        return f"{self.subject} was {began}{ends}{reason}"


def first_pauses(
    connection: sa.Connection, schema: str | None, queues: Sequence[str]
) -> tuple[list[Pause], bool]:
    """Return up to `MAX_PAUSES` pauses, those of these queues first, and whether there are more."""
    found = read_pauses(connection, schema, queues, MAX_PAUSES + 1)
    return found[:MAX_PAUSES], len(found) > MAX_PAUSES


def read_pauses(
    connection: sa.Connection, schema: str | None, queues: Sequence[str] = (), at_most: int | None = None
) -> list[Pause]:
    """Return all pauses that have not ended, or `at_most`; those of these queues first."""
    parameters = {"first_queues": list(queues), "at_most": at_most}
    return [
        Pause(
            row["queue"],
            None if row["type"] == ALL_TYPES else row["type"],
            row["paused_at"],
            row["paused_by"],
            row["reason"],
            row["resume_at"],
            (row["now"] - row["paused_at"]).total_seconds(),
            None if row["resume_at"] is None else (row["resume_at"] - row["now"]).total_seconds(),
        )
        for row in connection.execute(pauses(schema), parameters).mappings()
    ]
