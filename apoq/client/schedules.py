"""The operations on schedules in a caller's transaction, for all kinds of sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apoq.client.session_adapters import Caller
from apoq.core.schedules import Timing
from apoq.errors import InvalidSchedule, command
from apoq.postgres.loaders import read_time
from apoq.schema.models import Schedule
from apoq.schema.objects import detached_schedule
from apoq.schema.statements.notify import has_tasks
from apoq.schema.statements.portable import read_row
from apoq.schema.statements.schedules import (
    CODE,
    add_now,
    delete_schedule,
    look_up,
    pause_schedule,
    resume_schedule,
    schedules,
    write_schedule,
)


def schedule(caller: Caller, schema: str | None, parameters: dict[str, Any], timing: Timing) -> Schedule:
    """Add or change a schedule, and return it."""
    (found,) = caller.execute(look_up(schema), parameters)
    _check_free(found, parameters)
    parameters = parameters | {"schedule_next_at": timing.next_after(read_time(found["now"])).timestamp()}
    written = caller.execute(write_schedule(schema, mapped=caller.has_orm_listeners), parameters)
    if not written:
        # Another session has added one in the meantime.
        (found,) = caller.execute(look_up(schema), parameters)
        _check_free(found, parameters)
    (row,) = caller.execute(schedules(schema, by_name=True), parameters)
    return detached_schedule(schema, read_row(row))


def unschedule(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> bool:
    """Delete a schedule; return whether there was one."""
    return bool(caller.execute(delete_schedule(schema, mapped=caller.has_orm_listeners), parameters))


def read_schedules(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> list[Schedule]:
    """Return the schedules of a queue."""
    rows = caller.execute(schedules(schema), parameters)
    return [detached_schedule(schema, read_row(row)) for row in rows]


def pause(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> bool:
    """Pause a schedule; return whether it was not paused already."""
    return bool(caller.execute(pause_schedule(schema), parameters))


def resume(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> bool:
    """Resume a schedule; return whether it was paused."""
    return bool(caller.execute(resume_schedule(schema), parameters))


def run_now(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> int | None:
    """Add a task of a schedule now, and return its id; None if there is no such schedule."""
    for row in caller.execute(add_now(schema), parameters):
        caller.notify(has_tasks(schema, parameters["schedule_queue"]))
        task_id: int = row["id"]
        return task_id
    return None


def _check_free(found: Mapping[Any, Any], parameters: Mapping[str, Any]) -> None:
    """Raise `InvalidSchedule` if a schedule of this name has another type or origin."""
    if (problem := conflict(found, parameters)) is not None:
        raise InvalidSchedule(problem)


def conflict(found: Mapping[Any, Any], parameters: Mapping[str, Any]) -> str | None:
    """Return why a schedule can't be written, as `look_up` has found it."""
    name, type_ = parameters["schedule_name"], parameters["schedule_type"]
    if found["type"] is None or (found["type"], found["origin"]) == (type_, parameters["schedule_origin"]):
        return None
    if found["type"] != type_:
        fault = f"the schedule {name!r} must keep its type, {found['type']!r}, got {type_!r}"
    elif found["origin"] == CODE:
        fault = f"the schedule {name!r} must not be added, because @queue.task declares it"
    else:
        fault = (
            f"the schedule {name!r} must not be declared by @queue.task, because queue.schedule has added it"
        )
    return f"{fault}: choose another name, or remove it first (`{command('schedules remove NAME')}`)"
