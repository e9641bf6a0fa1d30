"""The changes that people make. Each is a call of the API for callers, in a transaction of its own."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from apoq.client import schedules
from apoq.client.operations import pause, resume
from apoq.client.queue import Queue
from apoq.client.session_adapters import Caller, through
from apoq.core.limits import MAX_OF_POOL
from apoq.core.options import checked_reason, pause_end
from apoq.dashboard.keys import OF_KEY, OF_TYPE, Limited, limit_of
from apoq.dashboard.many import CANCELLED_HERE, MOST, change_many, described, many_actions, read_wanted
from apoq.dashboard.site import Site
from apoq.monitor.formatting import clean, tasks
from apoq.monitor.rights import Rights
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.find import find_queues
from apoq.schema.statements.pauses import ALL_TYPES

logger = logging.getLogger("apoq.dashboard")

BACK: Final = re.compile(
    r"(?:queue|tasks(?:/-?\d{1,19})?|failures|keys|schedules|workers|doctor)?(?:\?[\w.~%&=+-]*)?", re.ASCII
)
"""The pages to which an action may return: never a place outside of the dashboard."""

_ID: Final = re.compile(r"-?\d{1,19}", re.ASCII)
_NUMBER: Final = re.compile(r"\d{1,9}", re.ASCII)

LENGTHS: Final = {"": None, "1h": 3_600, "4h": 4 * 3_600, "1d": 86_400}
"""How long a pause may last."""


class InvalidForm(ValueError):
    """A form without a field that it must have. Our own pages don't send it."""


class AskFirst(Exception):
    """A change that may hurt, which has to be confirmed on the page at this address."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address


class StoredQueue(Queue):
    """A queue with the name in a row, even if `Queue` would refuse that name."""

    def __init__(self, name: str, schema: str | None) -> None:
        self.name, self.schema = name, schema


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
    task_id = _id(form)
    with site.writing() as connection:
        found = connection.execute(find_queues(site.schema), {"ids": array_text([task_id])}).all()
        if not found:
            return f"There is no task {task_id} any more."
        queue = StoredQueue(found[0][1], site.schema)
        if action == "cancel":
            is_done = queue.cancel(connection, task_id, reason=form.get("reason") or CANCELLED_HERE)
        else:
            is_done = queue.retry(connection, task_id)
    return f"{done} task {task_id}." if is_done else f"Task {task_id} was not changed: {not_done}."


def _retry(site: Site, form: Mapping[str, str]) -> str:
    not_done = "it has not ended, or another task holds its unique key"
    return _change_task(site, form, "retry", "Retried", not_done)


def _cancel(site: Site, form: Mapping[str, str]) -> str:
    return _change_task(site, form, "cancel", "Cancelled", "it had already ended")


def _many(site: Site, form: Mapping[str, str], action: str, done: str) -> str:
    wanted, at_most = read_wanted(form), _number(form, "at_most", MOST)
    if action not in many_actions(wanted):
        raise InvalidForm(f"the form must have a state whose tasks can be changed by {action!r}")
    try:
        until = datetime.fromisoformat(_field(form, "until")).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidForm("the field 'until' must be a time") from error
    changed = change_many(site, action, wanted, until, at_most)
    said = f"{done} {tasks(changed.number)} ({described(wanted)})."
    left = at_most - changed.number
    if changed.problem:
        return f"{said} {changed.problem}"
    if left and at_most < MOST:
        return f"{said} {tasks(left)} had changed in the meantime, or can't be changed now."
    return said


def _limit(site: Site, form: Mapping[str, str]) -> str:
    its, at_most = _limited(form), _number(form, "at_most", MAX_OF_POOL)
    if at_most == 0:
        _ask_first(its, form, at_most)
    _set_limit(site, its, at_most)
    return f"Limited {its} to {at_most:,}."


def _remove_limit(site: Site, form: Mapping[str, str]) -> str:
    its = _limited(form)
    _ask_first(its, form)
    _set_limit(site, its, None)
    return f"Removed the limit that was set for {its}."


def _limited(form: Mapping[str, str]) -> Limited:
    its = limit_of(form)
    if its is None:
        raise InvalidForm("choose what the limit is for: a queue, a type or a key of it, with its name")
    return its


def _ask_first(its: Limited, form: Mapping[str, str], at_most: int | None = None) -> None:
    """Raise `AskFirst` unless the change was confirmed."""
    if form.get("confirmed") != "yes":
        given = {} if at_most is None else {"at_most": at_most}
        raise AskFirst(f"limit?{urlencode({**its._asdict(), **given, 'back': form.get('back', '')})}")


def _set_limit(site: Site, its: Limited, at_most: int | None) -> None:
    queue = StoredQueue(its.queue, site.schema)
    given = {OF_TYPE: {"type": its.name}, OF_KEY: {"key": its.name}}.get(its.of, {})
    with site.writing() as connection:
        queue.limit(connection, at_most, **given)


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


def _id(form: Mapping[str, str]) -> int:
    text = _field(form, "id")
    if not _ID.fullmatch(text) or not -(2**63) <= int(text) < 2**63:
        raise InvalidForm("the field 'id' must be the id of a task")
    return int(text)


def _number(form: Mapping[str, str], name: str, most: int) -> int:
    text = _field(form, name)
    if not _NUMBER.fullmatch(text) or int(text) > most:
        raise InvalidForm(f"the number must be from 0 to {most:,}, got {clean(text[:20])!r}")
    return int(text)


def _may_tasks(rights: Rights) -> bool:
    return rights.tasks


def _may_pauses(rights: Rights) -> bool:
    return rights.pauses


def _may_schedules(rights: Rights) -> bool:
    return rights.schedules


def _may_limits(rights: Rights) -> bool:
    return rights.limits


ACTIONS: Final[Mapping[str, Action]] = {
    "retry": Action(_retry, _may_tasks),
    "cancel": Action(_cancel, _may_tasks),
    "retry-many": Action(lambda site, form: _many(site, form, "retry", "Retried"), _may_tasks),
    "cancel-many": Action(lambda site, form: _many(site, form, "cancel", "Cancelled"), _may_tasks),
    "pause": Action(_pause, _may_pauses),
    "resume": Action(_resume, _may_pauses),
    "limit": Action(_limit, _may_limits),
    "remove-limit": Action(_remove_limit, _may_limits),
    "run-schedule": Action(_run_schedule, lambda rights: rights.runs),
    "pause-schedule": Action(_pause_schedule, _may_schedules),
    "resume-schedule": Action(_resume_schedule, _may_schedules),
}
"""The actions by the field `action` of a form."""
