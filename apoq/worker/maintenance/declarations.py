"""Writes the schedules that a worker's code declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Executable

from apoq.client.queue import Queue
from apoq.client.queue_schedules import schedule_parameters
from apoq.client.schedules import conflict
from apoq.client.typed_task import TypedTask
from apoq.core.payload import encode
from apoq.core.schedules import Timing, checked_task
from apoq.schema.statements.schedules import CODE, look_up, write_schedule
from apoq.worker import logs

Run = Callable[[Executable, Mapping[str, Any]], Iterable[Any]]
"""Executes one statement, and returns its rows as tuples."""


class Declarations:
    """Writes the schedules of typed tasks, once for each start of a worker.

    They are never deleted, because another deployment may use the same tables. A schedule that a later
    release has declared stays as it is, so that old workers that start during a deployment don't undo it.
    """

    def __init__(self, schema: str | None, queues: Iterable[Queue], release: datetime) -> None:
        self._schema = schema
        self._queues = tuple(queues)
        self._release = release
        self._written: set[tuple[Queue, TypedTask[..., Any]]] = set()

    def forget(self) -> None:
        """Write all of them again."""
        self._written.clear()

    def write(self, run: Run, now: datetime) -> bool:
        """Write those that are new; return whether there were any. Their first ticks are after `now`."""
        new = [
            (queue, task)
            for queue in self._queues
            for task in queue.scheduled_tasks()
            if (queue, task) not in self._written
        ]
        for queue, task in new:
            try:
                its = declaration(queue, task, now)
            except Exception as error:  # noqa: BLE001 - such as from the function of a limit's key
                logs.schedule_not_declared(queue.name, task.type, error)
            else:
                self._write(run, its | {"schedule_release": self._release})
            self._written.add((queue, task))
        return bool(new)

    def _write(self, run: Run, parameters: dict[str, Any]) -> None:
        if list(run(write_schedule(self._schema), parameters)):
            return
        queue, name = parameters["schedule_queue"], parameters["schedule_name"]
        for _, type_, origin, *times in run(look_up(self._schema), parameters):
            if problem := conflict({"type": type_, "origin": origin}, parameters):
                logs.schedule_not_declared(queue, name, problem)
            elif times != _times(parameters):
                logs.schedule_kept(queue, name)


def _times(parameters: Mapping[str, Any]) -> list[Any]:
    """Return the times of a schedule, as `look_up` returns them."""
    every = parameters["schedule_every"]
    its_every = None if every is None else every.total_seconds()
    return [parameters["schedule_cron"], parameters["schedule_timezone"], its_every]


def declaration(queue: Queue, task: TypedTask[..., Any], now: datetime) -> dict[str, Any]:
    """Return the parameters of `write_schedule`, except for the release."""
    values = task.schedule or {}
    timing = Timing(values["cron"], values["timezone"], values["every"])
    return {
        **schedule_parameters(queue.name, task.type, task.type, {**values, **checked_task({})}),
        "schedule_data": encode(task.scheduled_data(), queue.max_data_size),
        "schedule_origin": CODE,
        "schedule_key": task.concurrency_key_of(task.scheduled_data()),
        "schedule_next_at": timing.next_after(now).timestamp(),
    }
