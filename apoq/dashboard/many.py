"""Changes of all tasks of a list: their number, which a person confirms, and the changes themselves.

A change concerns the tasks that the list's filters select, up to the time of the count: those that fail or
are added after that are left as they are. It changes at most the number that was confirmed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import sqlalchemy.exc

from apoq.client import bulk
from apoq.client.session_adapters import Caller, through
from apoq.core.outcomes import Cancel, report
from apoq.core.payload import encode
from apoq.core.states import CANCELLED, COMPLETED, FAILED, PENDING, RUNNING, WAITING
from apoq.dashboard.messages import Request
from apoq.dashboard.problems import problem_of
from apoq.dashboard.site import NotFound, Page, Site
from apoq.monitor.browse import MAX_QUEUES, READY, RETRYING, SCHEDULED, VIEWS, Wanted, first_queues
from apoq.monitor.formatting import clean
from apoq.monitor.matching import COUNTED, count_matching

MOST: Final = COUNTED
"""How many tasks are changed at once."""

BATCH: Final = 1_000
"""How many tasks one transaction changes, so that it holds no lock for long."""

SECONDS: Final = 20.0
"""Seconds after which no other transaction begins, because proxies give up."""

CANCELLED_HERE: Final = "cancelled in the dashboard"

LONGEST: Final = 300
"""Characters of a list's description, which a cookie must have room for."""

_HAPPENED: Final = {
    RUNNING: "started",
    COMPLETED: "completed",
    FAILED: "failed",
    CANCELLED: "were cancelled",
}
"""The event before the count, by the state of the tasks; otherwise they were added."""


class Changed(NamedTuple):
    """How many tasks were changed, and why not all."""

    number: int
    problem: str = ""


def read_wanted(query: Mapping[str, str]) -> Wanted:
    """Read the filters of a list; unknown states are ignored.

    Spaces around what a person has typed are ignored. Names in links are exact: they may end with a space.
    """

    def given(name: str) -> str | None:
        text = query.get(name, "")
        return (text.strip() if "typed" in query else text) or None

    state = given("state")
    return Wanted(
        state if state in VIEWS else None, given("queue"), given("type"), given("key"), given("error")
    )


def many_actions(wanted: Wanted) -> tuple[str, ...]:
    """Return what can be done with all tasks of a list."""
    if wanted.state in {FAILED, CANCELLED, COMPLETED}:
        return ("retry",)
    return ("cancel",) if wanted.state in {READY, SCHEDULED, RETRYING, WAITING, RUNNING} else ()


def show_many(site: Site, request: Request) -> Page:
    """Show the number of tasks that would be changed, and ask."""
    wanted, action = read_wanted(request.query), request.query.get("action", "")
    if action not in many_actions(wanted):
        raise NotFound("There is nothing to change by this address.")
    found = site.snapshots.get(("many", wanted), lambda c: count_matching(c, site.schema, wanted))
    values = {
        "wanted": wanted,
        "action": action,
        "found": found,
        "at_most": found.number if found.is_all else MOST,
        "happened": _HAPPENED.get(wanted.state or "", "were added"),
        "max_queues": MAX_QUEUES,
    }
    return Page("many.html", f"{action.capitalize()} tasks", values, section="tasks", is_live=False)


def change_many(site: Site, action: str, wanted: Wanted, until: datetime, at_most: int) -> Changed:
    """Retry or cancel the tasks of a list as it was at the time `until`, in transactions of `BATCH` tasks."""
    change, changed, ends = _CHANGES[action], 0, time.monotonic() + SECONDS
    state, filters = _PENDING.get(wanted.state or "", wanted.state), _filters(wanted, until)
    try:
        for queue in _queues(site, wanted):
            has_more = True
            while has_more and changed < at_most:
                if time.monotonic() > ends:
                    return Changed(changed, f"{SECONDS:g} s were over: repeat it for the others.")
                selection = bulk.Selection(queue, (state,), filters, min(BATCH, at_most - changed))
                with site.writing() as connection:
                    number, skipped = _through(connection, site.schema, selection, change)
                changed += number
                has_more = number > 0 and number + skipped >= selection.at_most
    except sqlalchemy.exc.DBAPIError as error:
        problem = problem_of(error)
        if not changed or problem is None:
            raise
        return Changed(changed, f"Then it stopped: {problem.text}")
    return Changed(changed)


def described(wanted: Wanted) -> str:
    """Write which tasks a list has."""
    filters = {"queue": wanted.queue, "type": wanted.type, "key": wanted.key, "error": wanted.error}
    words = [wanted.state or "", *(f"{name} {value}" for name, value in filters.items() if value)]
    return clean(", ".join(words))[:LONGEST]


Change = Callable[[Caller, str | None, bulk.Selection], tuple[int, int]]
"""Makes a change, and returns how many tasks it has changed, and how many it could not change."""


def _retry(caller: Caller, schema: str | None, selection: bulk.Selection) -> tuple[int, int]:
    retried = bulk.retry_many(caller, schema, selection, timedelta(), timedelta())
    return len(retried.ids), retried.skipped


def _cancel(caller: Caller, schema: str | None, selection: bulk.Selection) -> tuple[int, int]:
    reason = encode(report(Cancel(CANCELLED_HERE)))
    return len(bulk.cancel_many(caller, schema, selection, reason)), 0


_CHANGES: Final[Mapping[str, Change]] = {"retry": _retry, "cancel": _cancel}
_PENDING: Final = dict.fromkeys((READY, SCHEDULED, RETRYING), PENDING)


def _through(connection: Any, schema: str | None, selection: bulk.Selection, change: Change) -> Any:
    return through(connection, lambda caller: change(caller, schema, selection))


def _queues(site: Site, wanted: Wanted) -> list[str]:
    if wanted.queue is not None:
        return [wanted.queue]
    names, _ = site.snapshots.get("queues", lambda c: first_queues(c, site.schema))
    return names


def _filters(wanted: Wanted, until: datetime) -> dict[str, Any]:
    """Return the filters of a list as those of `apoq.schema.statements.select_many`."""
    given = {"of_type": wanted.type, "of_either_key": wanted.key, "error_class": wanted.error}
    filters: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    filters["until"] = until
    if wanted.state == READY:
        filters["due_until"] = until
    if wanted.state in {SCHEDULED, RETRYING}:
        filters["due_after"] = until
    if wanted.state == RETRYING:
        filters["fails_from"] = 1
    return filters
