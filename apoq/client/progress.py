"""Reads the progress of tasks, for all kinds of sessions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from apoq.client.session_adapters import Caller
from apoq.schema.statements.portable import read_row
from apoq.schema.statements.progress import read_progress


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a task, as its processor has reported it last. Returned by `Queue.progress`.

    Attributes:
        done: How much is done.
        total: How much there is to do; None if that isn't known.
        note: A text for people.
        at: When it was written to the database.
    """

    done: float
    total: float | None
    note: str
    at: datetime

    @property
    def fraction(self) -> float | None:
        """The part that is done, from 0 to 1; None if the total isn't known."""
        if self.total is None:
            return None
        return min(1.0, self.done / self.total) if self.total else 1.0


def progress(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> Progress | None:
    """Return the progress of the task `task_id` of `from_queue`; None if it has reported none."""
    for row in caller.execute(read_progress(schema), parameters):
        return Progress(**read_row(row))
    return None
