"""The changes that people make. Each is a call of the API for callers, in a transaction of its own."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from apoq.client import schedules
from apoq.client.operations import pause, resume
from apoq.client.session_adapters import Caller, through
from apoq.core.options import checked_reason, pause_end
from apoq.dashboard.many import AT_MOST, CHANGES, StoredQueue, change_many
from apoq.dashboard.site import Site
from apoq.monitor.formatting import clean, tasks
from apoq.monitor.rights import Rights
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.find import find_queues
from apoq.schema.statements.pauses import ALL_TYPES

logger = logging.getLogger("apoq.dashboard")

BACK: Final = re.compile(
    r"(?:queue|tasks(?:/-?\d{1,19})?|failures|schedules|workers|doctor)?(?:\?[\w.~%&=+-]*)?", re.ASCII
)
"""The pages to which an action may return: never a place outside of the dashboard."""

_IDS: Final = re.compile(r"-?\d{1,19}(?:,-?\d{1,19})*", re.ASCII)

LENGTHS: Final = {"": None, "1h": 3_600, "4h": 4 * 3_600, "1d": 86_400}
"""How long a pause may last."""


class InvalidForm(ValueError):
    """A form without a field that it must have. Our own pages don't send it."""


class Action(NamedTuple):
    """A change, and whether the role of the connections may make it."""

    run: Callable[[Site, Mapping[str, str]], str]
    """Make the change, and return what has happened."""
    is_allowed: Callable[[Rights], bool]


def run(site: Site, action: Action, form: Mapping[str, str], client: str | None) -> str:
    """Make a change for a viewer at this address; return the message about it."""
    message = action.run(site, form)
    site.snapshots.forget()
    logger.info("%s (in the dashboard, from %s)", message, client)
    return message


def _change_task(site: Site, form: Mapping[str, str], action: str, done: str, not_done: str) -> str:
    task_id = _ids(form, "id")[0]
    with site.writing() as connection:
        found = connection.execute(find_queues(site.schema), {"ids": array_text([task_id])}).all()
        if not found:
            return f"There is no task {task_id} any more."
        queue = StoredQueue(found[0][1], site.schema)
        if action == "cancel" and form.get("reason"):
            is_done = queue.cancel(connection, task_id, reason=form["reason"])
        else:
            is_done = CHANGES[action](queue, connection, task_id)
    return f"{done} task {task_id}." if is_done else f"Task {task_id} was not changed: {not_done}."


def _retry(site: Site, form: Mapping[str, str]) -> str:
    not_done = "it has not ended, or another task holds its unique key"
    return _change_task(site, form, "retry", "Retried", not_done)


def _cancel(site: Site, form: Mapping[str, str]) -> str:
    return _change_task(site, form, "cancel", "Cancelled", "it had already ended")


def _many(site: Site, form: Mapping[str, str], action: str, done: str) -> str:
    ids = _ids(form, "ids")
    if len(ids) > AT_MOST:
        raise InvalidForm(f"at most {AT_MOST:,} tasks are changed at once, got {len(ids):,}")
    changed = change_many(site, action, ids)
    left = len(ids) - changed
    rest = f" {tasks(left)} had changed in the meantime." if left else ""
    return f"{done} {tasks(changed)}.{rest}"


def _pause(site: Site, form: Mapping[str, str]) -> str:
    length = form.get("length", "")
    if length not in LENGTHS:
        raise InvalidForm(f"the length of a pause must be one of {', '.join(filter(None, LENGTHS))}")
    parameters = {
        **_paused(form),
        "reason": checked_reason(form.get("reason", "")),
        **pause_end(LENGTHS[length]),
    }
    _through(site, lambda caller: pause(caller, site.schema, parameters))
    return f"Paused {_subject(form)}. Running tasks continue."


def _resume(site: Site, form: Mapping[str, str]) -> str:
    parameters = _paused(form)
    if _through(site, lambda caller: resume(caller, site.schema, parameters)):
        return f"Resumed {_subject(form)}."
    return f"The {_subject(form).removeprefix('the ')} was not paused."


def _paused(form: Mapping[str, str]) -> dict[str, Any]:
    return {"from_queue": _field(form, "queue"), "paused_type": form.get("type") or ALL_TYPES}


def _subject(form: Mapping[str, str]) -> str:
    queue, type_ = clean(form["queue"]), form.get("type")
    return f"the type {clean(type_)} of the queue {queue}" if type_ else f"the queue {queue}"


def _run_schedule(site: Site, form: Mapping[str, str]) -> str:
    parameters = _schedule(form)
    task_id = _through(site, lambda caller: schedules.run_now(caller, site.schema, parameters))
    if task_id is None:
        return f"There is no schedule {clean(form['schedule'])} any more."
    return f"Added task {task_id} of the schedule {clean(form['schedule'])}."


def _pause_schedule(site: Site, form: Mapping[str, str]) -> str:
    parameters, name = _schedule(form), clean(form["schedule"])
    is_done = _through(site, lambda caller: schedules.pause(caller, site.schema, parameters))
    return f"Paused the schedule {name}." if is_done else f"The schedule {name} is paused already."


def _resume_schedule(site: Site, form: Mapping[str, str]) -> str:
    parameters, name = _schedule(form), clean(form["schedule"])
    is_done = _through(site, lambda caller: schedules.resume(caller, site.schema, parameters))
    return f"Resumed the schedule {name}." if is_done else f"The schedule {name} is not paused."


def _schedule(form: Mapping[str, str]) -> dict[str, Any]:
    return {"schedule_queue": _field(form, "queue"), "schedule_name": _field(form, "schedule")}


def _through(site: Site, operation: Callable[[Caller], Any]) -> Any:
    with site.writing() as connection:
        return through(connection, operation)


def _field(form: Mapping[str, str], name: str) -> str:
    if not form.get(name):
        raise InvalidForm(f"the form must have the field {name!r}")
    return form[name]


def _ids(form: Mapping[str, str], name: str) -> list[int]:
    text = _field(form, name)
    ids = [int(each) for each in text.split(",")] if _IDS.fullmatch(text) else []
    if not ids or not all(-(2**63) <= each < 2**63 for each in ids):
        raise InvalidForm(f"the field {name!r} must have ids of tasks")
    return ids


def _may_tasks(rights: Rights) -> bool:
    return rights.tasks


def _may_pauses(rights: Rights) -> bool:
    return rights.pauses


def _may_schedules(rights: Rights) -> bool:
    return rights.schedules


ACTIONS: Final[Mapping[str, Action]] = {
    "retry": Action(_retry, _may_tasks),
    "cancel": Action(_cancel, _may_tasks),
    "retry-many": Action(lambda site, form: _many(site, form, "retry", "Retried"), _may_tasks),
    "cancel-many": Action(lambda site, form: _many(site, form, "cancel", "Cancelled"), _may_tasks),
    "pause": Action(_pause, _may_pauses),
    "resume": Action(_resume, _may_pauses),
    "run-schedule": Action(_run_schedule, lambda rights: rights.runs),
    "pause-schedule": Action(_pause_schedule, _may_schedules),
    "resume-schedule": Action(_resume_schedule, _may_schedules),
}
"""The actions by the field `action` of a form."""
