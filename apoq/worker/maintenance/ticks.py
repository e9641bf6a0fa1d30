"""One transaction of ticks: locks schedules that are due, adds their tasks, and moves the schedules on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import Executable

from apoq.core.schedules import Due, Timing, decide, offset
from apoq.errors import InvalidSchedule
from apoq.postgres.loaders import read_time
from apoq.schema.statements.ticks import add_ticks, lock_due, move_on

MAX_TASKS: Final = 1_000
"""Tasks that one transaction adds, at most, unless a single schedule adds more."""

MAX_SECONDS: Final = 1.0
"""Seconds for which one transaction decides about schedules while they are locked, about."""

Execute = Callable[[Executable, Mapping[str, Any]], Iterable[Sequence[Any]]]
"""Executes one statement of the transaction, and returns its rows, if it has any."""


class Key(NamedTuple):
    """The primary key of a schedule."""

    queue: str
    name: str


@dataclass
class Ticked:
    """The effects of one transaction."""

    locked: list[Key] = field(default_factory=list)
    """The schedules that were due."""
    queues: set[str] = field(default_factory=set)
    """The queues that have got tasks."""
    missed: list[Key] = field(default_factory=list)
    """The schedules with ticks that were missed, and became no tasks."""
    unreadable: dict[Key, InvalidSchedule] = field(default_factory=dict)
    """The schedules whose times can't be computed here; they were left as they are."""


def passed_over(keys: Iterable[Key]) -> dict[str, list[str]]:
    """Return the schedules that statements leave out, as their parameters."""
    keys = list(keys)
    return {"passed_queues": [key.queue for key in keys], "passed_names": [key.name for key in keys]}


def tick(
    execute: Execute,
    schema: str | None,
    queues: Sequence[str],
    *,
    at_most: int,
    ticked: Ticked,
    now: datetime | None = None,
    passed: Iterable[Key] = (),
) -> None:
    """Turn the ticks of up to `at_most` due schedules into tasks, in the caller's transaction.

    It notes in `ticked` what it does. `now` is the database's time by default. `passed` schedules are left
    out.
    """
    parameters = {
        "queues": list(queues),
        "at": None if now is None else now.timestamp(),
        "at_most": at_most,
        **passed_over(passed),
    }
    due: dict[Key, tuple[Due, timedelta]] = {}
    count, ends_at = 0, time.monotonic() + MAX_SECONDS
    for row in execute(lock_due(schema), parameters):
        its = _Row(*row)
        key = Key(its.queue, its.name)
        now = read_time(its.now)
        if ticked.locked and (count >= MAX_TASKS or time.monotonic() >= ends_at):
            break  # the next transaction goes on
        ticked.locked.append(key)
        try:
            due[key] = decision, _ = _decide(its, now)
        except InvalidSchedule as error:
            ticked.unreadable[key] = error
        else:
            count += len(decision.ticks)
            if decision.has_missed:
                ticked.missed.append(key)
    if now is None or not due:
        return
    added = _add(execute, schema, due, now) if count else {}
    ticked.queues.update(key.queue for key in added)
    _move_on(execute, schema, due, added)


class _Row(NamedTuple):
    """A row of `lock_due`. Times and durations are in seconds."""

    queue: str
    name: str
    cron: str | None
    timezone: str
    catch_up: str
    catch_up_limit: int
    every: float | None
    not_before: float | None
    jitter: float | None
    next_at: float
    now: float


def _decide(row: _Row, now: datetime) -> tuple[Due, timedelta]:
    """Return what happens to a schedule, and how long after a tick its task is due."""
    try:
        every = None if row.every is None else timedelta(seconds=row.every)
        decision = decide(
            Timing(row.cron, row.timezone, every),
            next_at=read_time(row.next_at),
            now=now,
            catch_up=row.catch_up,
            catch_up_limit=row.catch_up_limit,
            not_before=None if row.not_before is None else timedelta(seconds=row.not_before),
        )
        jitter = offset(row.queue, row.name, timedelta(seconds=row.jitter or 0.0))
    except (ArithmeticError, ValueError) as error:  # another program has written such values
        raise InvalidSchedule(str(error)) from error
    return decision, jitter


def _add(
    execute: Execute, schema: str | None, due: Mapping[Key, tuple[Due, timedelta]], now: datetime
) -> dict[Key, int]:
    """Add the tasks; return the highest id of each schedule's."""
    rows = [
        # Not earlier than now: claims have passed an earlier time, and would find the task only later.
        (*key, tick.timestamp(), max(now, tick + jitter).timestamp())
        for key, (decision, jitter) in due.items()
        for tick in decision.ticks
    ]
    names = ("queues", "names", "ticks", "due_times")
    parameters = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    added: dict[Key, int] = {}
    for task_id, queue, name in execute(add_ticks(schema), parameters):
        key = Key(queue, name)
        added[key] = max(task_id, added.get(key, task_id))
    return added


def _move_on(
    execute: Execute,
    schema: str | None,
    due: Mapping[Key, tuple[Due, timedelta]],
    added: Mapping[Key, int],
) -> None:
    decisions = {key: decision for key, (decision, _) in due.items()}
    parameters = {
        "queues": [key.queue for key in decisions],
        "names": [key.name for key in decisions],
        "last_ticks": [
            None if its.last_tick_at is None else its.last_tick_at.timestamp() for its in decisions.values()
        ],
        "next_times": [its.next_at.timestamp() for its in decisions.values()],
        "task_ids": [added.get(key) for key in decisions],
        "skipped": [int(bool(its.ticks) and key not in added) for key, its in decisions.items()],
    }
    execute(move_on(schema), parameters)
