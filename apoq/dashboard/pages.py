"""The pages. Each is a function of the site and the request, and reads one snapshot of the database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple

import psycopg
import sqlalchemy as sa
import sqlalchemy.exc

from apoq.core.states import WAITING
from apoq.dashboard.graph import drawing, more, note_of
from apoq.dashboard.keys import show_keys, show_limit
from apoq.dashboard.many import many_actions, read_wanted, show_many
from apoq.dashboard.messages import Request
from apoq.dashboard.site import NotFound, Page, Site
from apoq.dashboard.views import Task
from apoq.monitor.browse import MAX_QUEUES, VIEWS, Listing, browse, first_queues, read_edge, read_one
from apoq.monitor.check import BAD, OK, WARNING, Finding
from apoq.monitor.failures import last_failures
from apoq.monitor.graphs import graph_of
from apoq.monitor.keys import read_holders
from apoq.monitor.overview import (
    FEW_QUEUES,
    Overview,
    completion_rates,
    overview,
    read_workers,
)
from apoq.monitor.server_checks import check_clock, check_connections, check_server
from apoq.monitor.table_checks import (
    check_horizon,
    check_indexes,
    check_placement,
    check_queues,
    check_role,
    check_schedules,
    check_vacuum,
    check_version,
    check_workers,
)
from apoq.schema.preflight import READ_ONLY, ROLE
from apoq.schema.statements.browse import browse_schedules
from apoq.schema.statements.schedules import is_orphan

SCHEDULES: Final = 50
"""How many schedules are on a page."""

RATES_SECONDS: Final = 30.0
"""Seconds for which the plots of the last hour are kept."""

DOCTOR_SECONDS: Final = 30.0
"""Seconds for which the doctor's findings are kept: they need more statements than any other page."""


CHECKED_SCHEDULES: Final = 20
"""How many schedules the doctor checks here."""


class NavigationEntry(NamedTuple):
    """A page in the navigation."""

    path: str
    title: str


NAVIGATION: Final = (
    NavigationEntry("", "Overview"),
    NavigationEntry("tasks", "Tasks"),
    NavigationEntry("failures", "Failures"),
    NavigationEntry("schedules", "Schedules"),
    NavigationEntry("keys", "Limits"),
    NavigationEntry("workers", "Workers"),
    NavigationEntry("doctor", "Doctor"),
)


class TaskList(NamedTuple):
    """A page of tasks, and the queues to choose from."""

    listing: Listing
    queues: list[str]
    now: datetime


def show_overview(site: Site, request: Request) -> Page:
    """Show the queues."""
    after = request.query.get("after", "")
    found = site.snapshots.get(("overview", after), lambda c: overview(c, site.schema, after=after))
    names = tuple(queue.name for queue in found.queues)
    rates = _rates(site, names) if 0 < len(names) <= FEW_QUEUES else {}
    return Page("overview.html", "Overview", {"found": found, "after": after, "rates": rates})


def show_queue(site: Site, request: Request) -> Page:
    """Show one queue, with the plot of the last hour."""
    name = request.query.get("name", "")
    found = site.snapshots.get(("queue", name), lambda c: overview(c, site.schema, only=name))
    values = {"found": found, "queue": found.queues[0], "rates": _rates(site, (name,))[name]}
    return Page("queue.html", f"Queue {name}", values)


def _rates(site: Site, names: tuple[str, ...]) -> dict[str, list[float]]:
    return site.snapshots.get(
        ("rates", names), lambda c: completion_rates(c, site.schema, names), seconds=RATES_SECONDS
    )


def show_tasks(site: Site, request: Request) -> Page:
    """List tasks."""
    wanted = read_wanted(request.query)
    after = request.query.get("after")
    edge = None if after is None else read_edge(after)

    def read(connection: sa.Connection) -> TaskList:
        listing = browse(connection, site.schema, wanted, edge)
        return TaskList(listing, first_queues(connection, site.schema)[0], _now(connection))

    found = site.snapshots.get(("tasks", wanted, edge), read)
    values = {
        "tasks": [Task(row, site.redactor, found.now) for row in found.listing.tasks],
        "found": found,
        "wanted": wanted,
        "views": VIEWS,
        "max_queues": MAX_QUEUES,
        "is_first": edge is None,
        "many": many_actions(wanted),
    }
    return Page("tasks.html", "Tasks", values, section="tasks", is_live=edge is None)


def show_task(site: Site, _request: Request, task_id: int) -> Page:
    """Show everything about a task."""

    def read(connection: sa.Connection) -> Any:
        if (row := read_one(connection, site.schema, task_id)) is None:
            return None
        held_by = read_holders(connection, site.schema, row) if row["state"] == WAITING else ()
        return row, held_by, graph_of(connection, site.schema, task_id)

    found = site.snapshots.get(("task", task_id), read)
    if found is None:
        raise NotFound(f"There is no task {task_id}: it was never committed, or it was pruned.")
    row, held_by, graph = found
    task = Task(row, site.redactor, row["now"])
    values = {
        "task": task,
        "held_by": held_by,
        "graph": graph,
        "drawing": drawing(task, graph) if graph else None,
        "more": more,
        "note_of": note_of,
    }
    return Page("task.html", f"Task {task_id}", values, section="tasks", is_live=not task.is_ended)


def show_failures(site: Site, request: Request) -> Page:
    """Show the failed tasks in groups."""
    queue = request.query.get("queue") or None

    def read(connection: sa.Connection) -> Any:
        names, has_more = first_queues(connection, site.schema)
        chosen = names if queue is None else [queue]
        return last_failures(connection, site.schema, chosen), names, has_more, _now(connection)

    found, queues, has_more, now = site.snapshots.get(("failures", queue), read)
    values = {
        "found": found,
        "queues": queues,
        "queue": queue,
        "now": now,
        "has_more_queues": has_more and queue is None,
        "max_queues": MAX_QUEUES,
    }
    return Page("failures.html", "Failures", values, section="failures")


def show_schedules(site: Site, request: Request) -> Page:
    """List the schedules."""
    edge = request.query.get("after_queue", ""), request.query.get("after", "")

    def read(connection: sa.Connection) -> Any:
        parameters = {
            "from_queue": None,
            "named": None,
            "after_queue": edge[0],
            "after_name": edge[1],
            "at_most": SCHEDULES + 1,
        }
        return connection.execute(browse_schedules(site.schema), parameters).mappings().all()

    rows = site.snapshots.get(("schedules", edge), read)
    values = {"schedules": rows[:SCHEDULES], "has_more": len(rows) > SCHEDULES, "is_orphan": is_orphan}
    return Page("schedules.html", "Schedules", values, section="schedules")


def show_workers(site: Site, _request: Request) -> Page:
    """List the workers."""
    found = site.snapshots.get("workers", lambda c: read_workers(c, site.schema))
    return Page("workers.html", "Workers", {"found": found}, section="workers")


def show_doctor(site: Site, _request: Request) -> Page:
    """Show what `apoq doctor` says of the server, the tables and the workers."""
    found = site.snapshots.get("doctor", lambda c: list(_examine(c, site.schema)), seconds=DOCTOR_SECONDS)
    counts = {level: sum(finding.level == level for finding in found) for level in (BAD, WARNING, OK)}
    order = sorted(found, key=lambda finding: (BAD, WARNING, OK).index(finding.level))
    values = {"findings": order, "counts": counts, "seconds": DOCTOR_SECONDS}
    return Page("doctor.html", "Doctor", values, section="doctor")


def _examine(connection: sa.Connection, schema: str | None) -> Iterator[Finding]:
    def figures() -> Iterable[Finding]:
        found: Overview = overview(connection, schema, is_brief=True)
        return [*check_workers(found), *check_queues(found)]

    def rights() -> Iterable[Finding]:
        found = list(check_role(connection, schema))
        if not found or found[0].subject != ROLE:
            found.append(Finding(OK, ROLE, "this role has the rights that a worker needs"))
        # The transaction of this page is read-only by itself.
        return [each for each in found if each.subject != READ_ONLY or "standby" in each.text]

    checks: Mapping[str, Callable[[], Iterable[Finding]]] = {
        # Its timeouts are those of this connection.
        "server": lambda: [each for each in check_server(connection) if each.subject != "timeouts"],
        "clock": partial(check_clock, connection),
        "connections": partial(check_connections, connection),
        "rights": rights,
        "tables": partial(check_version, connection, schema),
        "citus": partial(check_placement, connection, schema),
        "vacuum": partial(check_vacuum, connection, schema),
        "indexes": partial(check_indexes, connection, schema),
        "transactions": partial(check_horizon, connection),
        "workers": figures,
        "schedules": partial(check_schedules, connection, schema, CHECKED_SCHEDULES),
    }
    for subject, check in checks.items():
        try:
            with connection.begin_nested():
                yield from list(check())
        except sqlalchemy.exc.DBAPIError as error:
            if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
                raise
            yield Finding(WARNING, subject, "could not be checked, because this role may not read it")


def _now(connection: sa.Connection) -> datetime:
    now: datetime = connection.execute(sa.select(sa.func.now())).scalar_one()
    return now


PAGES: Final[Mapping[str, Callable[[Site, Request], Page]]] = {
    "/": show_overview,
    "/queue": show_queue,
    "/tasks": show_tasks,
    "/many": show_many,
    "/failures": show_failures,
    "/keys": show_keys,
    "/limit": show_limit,
    "/schedules": show_schedules,
    "/workers": show_workers,
    "/doctor": show_doctor,
}
"""The pages by their path; a task's page is ``/tasks/ID``."""

WRITERS_ONLY: Final = {"/many", "/limit"}
