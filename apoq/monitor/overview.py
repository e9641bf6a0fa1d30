"""The statistics of queues and workers for a page, by statements that read a bounded number of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from apoq.core.states import WAITING
from apoq.monitor.browse import first_queues
from apoq.monitor.pauses import Pause, first_pauses
from apoq.monitor.stats import MINUTE, WorkerFigures
from apoq.schema.statements.overview import (
    count_claimed,
    count_noted,
    count_queues,
    find_reasons,
    sample_completions,
)
from apoq.schema.statements.workers import workers

FEW_QUEUES: Final = 5
"""Up to how many queues are counted further, and have a plot each."""


class Bounds(NamedTuple):
    """How many tasks of each queue are read at most, so that a page reads a bounded number of blocks."""

    counted: int
    """Up to how many tasks in a state are counted."""
    probed: int
    """Up to how many due tasks, and tasks that are due later, are counted if there are too many in all."""
    reasons: int
    """How many waiting tasks are read for their reasons."""


FEW: Final = Bounds(counted=1_000, probed=30, reasons=20)
MANY: Final = Bounds(counted=500, probed=10, reasons=3)
NONE: Final = Bounds(counted=0, probed=0, reasons=0)

MAX_RUNNING: Final = 1_000
MAX_WORKERS: Final = 200

STEPS: Final = 12
"""Into how many parts the last hour is divided."""

SAMPLED_OF_ONE: Final = 5_000
SAMPLED_OF_FEW: Final = 400
"""How many completions in such a part are counted, of one queue and of each of several."""

HOUR: Final = 3_600.0


class Bounded(NamedTuple):
    """A number of tasks that were counted up to a bound."""

    number: int
    has_more: bool
    """Whether there are more than that."""


@dataclass
class QueueSummary:
    """The tasks of a queue by their state.

    A number of ``bounds.counted + 1`` means that there may be any number.
    """

    name: str
    bounds: Bounds
    ready: Bounded
    """With the running ones if there are more of these than were counted."""
    scheduled: Bounded
    waiting: int
    reasons: dict[str, int]
    """Why they wait, and how many of the first ``bounds.reasons`` of them do so for this reason."""
    running: Bounded
    failed: Bounded
    """Counted among `counted` failed and cancelled tasks."""
    lag: float | None
    """For how many seconds the oldest ready task has been due."""
    oldest_type: str | None
    """The type of that task."""
    per_minute: float
    pauses: list[Pause] = field(default_factory=list)


@dataclass
class Overview:
    """Everything on the first page, from one snapshot."""

    queues: list[QueueSummary]
    next_queue: str | None
    """The queue behind which the next page begins."""
    workers: list[WorkerFigures]
    has_more_workers: bool
    pauses: list[Pause]
    has_more_pauses: bool
    orphans: int
    """Running tasks whose worker is not alive."""
    now: datetime
    unnoted: int = 0

    @property
    def has_more_queues(self) -> bool:
        """Whether there are queues behind these."""
        return self.next_queue is not None


@dataclass
class Workers:
    """The workers, those with the latest heartbeat first."""

    listed: list[WorkerFigures]
    has_more: bool
    """Whether there are workers that are not listed."""
    has_more_running: bool
    """Whether they may run more tasks than were counted."""


def overview(
    connection: sa.Connection,
    schema: str | None,
    *,
    after: str = "",
    only: str | None = None,
    is_brief: bool = False,
) -> Overview:
    """Return the statistics of the queues that follow `after`, or of the queue `only`.

    With `is_brief`, only the workers, the pauses and the lags are right.
    """
    names, has_more = ([only], False) if only is not None else first_queues(connection, schema, after=after)
    is_few = len(names) <= FEW_QUEUES
    bounds = NONE if is_brief else FEW if is_few else MANY

    def rows(statement: sa.Select[Any], **parameters: Any) -> list[sa.RowMapping]:
        return list(connection.execute(statement, {"in_queues": names, **parameters}).mappings())

    running, has_more_running = _running(connection, schema)
    seen = rows(workers(schema), at_most=MAX_WORKERS + 1)
    pauses, has_more_pauses = first_pauses(connection, schema, names)
    reasons = [] if is_brief else rows(find_reasons(schema), looked_at=bounds.reasons)
    counts = rows(count_queues(schema), counted=bounds.counted + 1, probed=bounds.probed + 1)
    found = [
        _summary(
            row,
            bounds,
            Bounded(
                sum(each["number"] for each in running if each["queue"] == row["queue"]), has_more_running
            ),
            {
                each["waiting_for"] or WAITING: each["number"]
                for each in reasons
                if each["queue"] == row["queue"]
            },
            [pause for pause in pauses if pause.queue == row["queue"]],
        )
        for row in counts
    ]
    return Overview(
        sorted(found, key=lambda queue: names.index(queue.name)),
        names[-1] if has_more else None,
        [_worker(row, running) for row in seen[:MAX_WORKERS]],
        len(seen) > MAX_WORKERS,
        pauses,
        has_more_pauses,
        sum(row["number"] for row in running if not row["is_alive"]),
        connection.execute(sa.select(sa.func.now())).scalar_one(),
    )


def read_workers(connection: sa.Connection, schema: str | None) -> Workers:
    """Return the workers."""
    running, has_more_running = _running(connection, schema)
    rows = connection.execute(workers(schema), {"at_most": MAX_WORKERS + 1}).mappings().all()
    listed = [_worker(row, running) for row in rows[:MAX_WORKERS]]
    return Workers(listed, len(rows) > MAX_WORKERS, has_more_running)


def _running(connection: sa.Connection, schema: str | None) -> tuple[list[sa.RowMapping], bool]:
    """Return the numbers of running tasks, and whether there may be more of them."""
    noted = connection.execute(count_noted(schema), {"counted": MAX_RUNNING + 1}).scalar_one()
    running = connection.execute(count_claimed(schema), {"counted": MAX_RUNNING}).mappings()
    return list(running), noted > MAX_RUNNING


def _worker(row: sa.RowMapping, running: list[sa.RowMapping]) -> WorkerFigures:
    shown = ("host", "pid", "version", "queues", "concurrency", "up_for", "unseen_for", "is_alive")
    its = sum(each["number"] for each in running if each["worker_id"] == row["id"])
    return WorkerFigures(id=str(row["id"]), running=its, **{name: row[name] for name in shown})


def _summary(
    row: sa.RowMapping,
    bounds: Bounds,
    running: Bounded,
    reasons: dict[str, int],
    pauses: list[Pause],
) -> QueueSummary:
    per_minute = float(row["minute"])
    if row["minute"] > bounds.counted:
        per_minute = row["minute"] / max(row["minute_began"], 0.001) * MINUTE
    due = _bounded(row, row["open_due"], "due", bounds)
    return QueueSummary(
        name=row["queue"],
        bounds=bounds,
        # The index has running tasks as well.
        ready=due
        if due.has_more or running.has_more
        else Bounded(max(0, due.number - running.number), has_more=False),
        scheduled=_bounded(row, row["open"] - row["open_due"], "later", bounds),
        waiting=row["waiting"],
        reasons=reasons,
        running=running,
        failed=Bounded(min(row["failed"], bounds.counted), has_more=row["ended"] > bounds.counted),
        lag=row["lag"],
        oldest_type=row["oldest_type"],
        per_minute=per_minute,
        pauses=pauses,
    )


def _bounded(row: sa.RowMapping, number: int, probed: str, bounds: Bounds) -> Bounded:
    """Return a number of open tasks: of all of them, or, if there are too many, of the first ones."""
    if row["open"] <= bounds.counted:
        return Bounded(number, has_more=False)
    least = max(min(number, bounds.counted), min(row[probed], bounds.probed))
    return Bounded(least, has_more=row[probed] > bounds.probed)


def completion_rates(
    connection: sa.Connection, schema: str | None, names: Sequence[str]
) -> dict[str, list[float]]:
    """Return the completions per minute of these queues in the last hour, from the oldest part to the newest.

    They are estimates if there were too many to count.
    """
    sampled = SAMPLED_OF_ONE if len(names) == 1 else SAMPLED_OF_FEW
    parameters = {"in_queues": list(names), "steps": STEPS, "counted": sampled}
    found: dict[str, list[float]] = {}
    for row in connection.execute(sample_completions(schema), parameters).mappings():
        part = HOUR / STEPS
        span = part if row["number"] < sampled else max(row["span"], 0.001)
        rates = found.setdefault(row["queue"], [0.0] * STEPS)
        rates[STEPS - 1 - row["part"]] = row["number"] / span * MINUTE
    return found
