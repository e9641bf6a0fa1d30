"""Groups failed tasks by what went wrong, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from apoq.core.states import FAILED
from apoq.monitor.tracebacks import own_frame
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.browse import browse_failed, read_errors
from apoq.schema.statements.find import failed_tasks

EXAMINED: Final = 10_000
"""How many failed tasks are grouped at most: the newest."""

EXAMINED_FOR_A_PAGE: Final = 400
"""The same for a page that is looked at every few seconds."""

EXCERPT: Final = 500
"""Characters of a message that are shown."""


@dataclass
class FailureGroup:
    """Tasks of a type that failed with the same class of error at the same place."""

    type: str
    error_class: str
    where: str | None
    """The innermost line of the application's own code, as "file.py:12 in function", if there is any."""
    count: int
    first_at: datetime | None
    last_at: datetime | None
    """When the first and the last of them failed."""
    last_id: int
    """The newest of them."""
    message: str
    """The message of that one."""
    queues: set[str]


@dataclass
class Failures:
    """The groups, the largest first, and how many tasks were examined."""

    groups: list[FailureGroup]
    examined: int
    now: datetime | None
    is_all: bool
    """Whether there are no older failed tasks."""


def failures(connection: sa.Connection, schema: str | None, filters: dict[str, Any]) -> Failures:
    """Group the newest failed tasks that the filters of `find` select."""
    parameters = {**filters, "at_most": EXAMINED, "excerpt": EXCERPT}
    return _grouped(connection.execute(failed_tasks(schema), parameters).mappings().all(), EXAMINED)


def last_failures(connection: sa.Connection, schema: str | None, queues: list[str]) -> Failures:
    """Group the failed tasks among those of these queues that failed or were cancelled last.

    It reads a bounded number of blocks, however many tasks have failed, and when.
    """
    per_level = max(1, EXAMINED_FOR_A_PAGE // max(1, len(queues)))
    parameters = {
        "in_queues": queues,
        "edge_time": datetime.max.replace(tzinfo=UTC),
        "per_level": per_level,
        "with_error": False,
    }
    rows = connection.execute(browse_failed(schema), parameters).all()
    ids = [row.id for row in rows if row.state == FAILED]
    errors = connection.execute(read_errors(schema), {"ids": array_text(ids), "excerpt": EXCERPT})
    found = _grouped(sorted(errors.mappings(), key=lambda row: -row["id"]), len(ids))
    found.is_all = len(rows) < per_level
    return found


def _grouped(rows: Sequence[sa.RowMapping], at_most: int) -> Failures:
    groups: dict[tuple[str, str, str | None], FailureGroup] = {}
    examined, now = 0, None
    for row in rows:
        examined, now = examined + 1, row["now"]
        error_class, where = row["class"] or "", _where(row["traceback"] or "")
        key = row["type"], error_class, where
        if (group := groups.get(key)) is None:
            groups[key] = group = FailureGroup(
                *key, 0, row["failed_at"], row["failed_at"], row["id"], row["message"] or "", set()
            )
        group.count += 1
        group.queues.add(row["queue"])
        if failed_at := row["failed_at"]:
            group.first_at = min(group.first_at or failed_at, failed_at)
            group.last_at = max(group.last_at or failed_at, failed_at)
    groups_by_size = sorted(groups.values(), key=lambda group: -group.count)
    return Failures(groups_by_size, examined, now, is_all=examined < at_most)


def _where(traceback: str) -> str | None:
    frame = own_frame(traceback.splitlines())
    if frame is None:
        return None
    file = frame.file.replace("\\", "/").rsplit("/", 1)[-1]
    return f"{file}:{frame.line} in {frame.function}"
