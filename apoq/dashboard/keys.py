"""The page of keys and limits, and the question before a change of a limit that may hurt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from apoq.core.places import KEY, POOL, WHOLE_QUEUE
from apoq.dashboard.messages import Request
from apoq.dashboard.site import NotFound, Page, Site
from apoq.monitor.browse import MAX_QUEUES, first_queues
from apoq.monitor.formatting import clean
from apoq.monitor.keys import (
    Bounds,
    KeyFigures,
    Share,
    count_tasks,
    find_keys,
    limited,
    read_limit,
    read_limits,
)

KEYS: Final = 10
"""How many keys and pools are on a page."""

LIMITS: Final = 50
"""How many limits are on a page."""

RUNNING, WAITING = 200, 1_000
"""How many running and waiting tasks are counted on a page, of all its keys and pools together."""

OF_QUEUE, OF_TYPE, OF_KEY = "queue", "type", "key"
"""The kinds of limits, in forms."""


class Limited(NamedTuple):
    """The subject of a limit: a queue, one of its types, or one of its keys."""

    queue: str
    of: str
    """`OF_QUEUE`, `OF_TYPE` or `OF_KEY`."""
    name: str

    def __str__(self) -> str:
        its = {OF_TYPE: f"the type {self.name} of ", OF_KEY: f"the key {self.name} of "}
        return clean(f"{its.get(self.of, '')}the queue {self.queue}")

    @property
    def share(self) -> Share:
        """The places that it limits."""
        name = WHOLE_QUEUE if self.of == OF_QUEUE else self.name
        return Share(self.queue, KEY if self.of == OF_KEY else POOL, name)

    @property
    def place(self) -> tuple[str, str, str]:
        """The queue, the type and the key of its row."""
        return self.queue, self.name if self.of == OF_TYPE else "", self.name if self.of == OF_KEY else ""


def limit_of(fields: Mapping[str, str]) -> Limited | None:
    """Read from a form or an address what a limit is for; None if that is incomplete."""
    queue, of, name = (fields.get(each, "") for each in ("queue", "of", "name"))
    is_complete = queue and (of == OF_QUEUE or (of in {OF_TYPE, OF_KEY} and name))
    return Limited(queue, of, "" if of == OF_QUEUE else name) if is_complete else None


def of_figures(figures: KeyFigures) -> Limited:
    """Return what the limit of a key or a pool is for."""
    if figures.key is not None:
        return Limited(figures.queue, OF_KEY, figures.key)
    return Limited(figures.queue, OF_TYPE if figures.type else OF_QUEUE, figures.type or "")


def of_row(row: Mapping[Any, Any]) -> Limited:
    """Return what the limit of a row is for."""
    of = OF_KEY if row["key"] else OF_TYPE if row["type"] else OF_QUEUE
    return Limited(row["queue"], of, row["key"] or row["type"])


def state_of(figures: KeyFigures, bounds: Bounds) -> str:
    """Return in one word whether tasks of a key or a pool can begin; nothing if their limits differ."""
    if figures.held_by is not None:
        return "held"
    if figures.at_most is None:
        return ""
    if figures.at_most == 0:
        return "paused"
    # If there are too many running tasks to count them, those that wait say that no place is free.
    is_uncounted = figures.running > bounds.running and figures.waiting > 0
    return "full" if figures.is_full or is_uncounted else "free"


class Keys(NamedTuple):
    """The contents of the page, from one snapshot."""

    keys: list[KeyFigures]
    next_key: Share | None
    """Behind which key the next page begins."""
    bounds: Bounds
    limits: Sequence[sa.RowMapping]
    next_limit: tuple[str, str, str] | None
    queues: list[str]
    has_more_queues: bool


def show_keys(site: Site, request: Request) -> Page:
    """Show the keys and pools of which tasks run or wait, and the limits."""
    query = request.query
    queue, name = query.get("queue") or None, query.get("name") or None
    only_waiting = query.get("waiting") == "1"
    after, after_limit = _share(query), _place(query)
    # Each list has pages of its own.
    shows_keys = not any(after_limit)
    shows_limits = after is None and name is None and not only_waiting

    def read(connection: sa.Connection) -> Keys:
        names, has_more = first_queues(connection, site.schema)
        shares: list[Share] = []
        if name is not None:
            its = names if queue is None else [queue]
            shares = [Share(each, kind, name) for each in its for kind in (KEY, POOL)]
        elif shows_keys:
            shares = find_keys(
                connection, site.schema, KEYS + 1, after=after, queue=queue, with_running=not only_waiting
            )
        shown = shares if name is not None else shares[:KEYS]
        bounds = _bounds(len(shown))
        found = [each for each in count_tasks(connection, site.schema, shown, bounds) if each.is_in_use]
        limits: Sequence[sa.RowMapping] = ()
        if shows_limits:
            limits = read_limits(connection, site.schema, LIMITS + 1, after=after_limit, queue=queue)
        return Keys(
            found,
            shown[-1] if len(shares) > len(shown) else None,
            bounds,
            limits[:LIMITS],
            of_row(limits[LIMITS - 1]).place if len(limits) > LIMITS else None,
            names,
            has_more,
        )

    found = site.snapshots.get(("keys", queue, name, only_waiting, after, after_limit), read)
    is_first = after is None and not any(after_limit)
    values = {
        "found": found,
        "shows_keys": shows_keys,
        "shows_limits": shows_limits,
        "queue": queue,
        "name": name,
        "only_waiting": only_waiting,
        "max_queues": MAX_QUEUES,
        "is_first": is_first,
        "of_figures": of_figures,
        "of_row": of_row,
        "limited": limited,
        "state_of": state_of,
    }
    return Page("keys.html", "Keys and limits", values, section="keys", is_live=is_first)


def show_limit(site: Site, request: Request) -> Page:
    """Ask before no task may begin any more (`at_most=0`), or before a limit that was set is removed."""
    its, at_most = limit_of(request.query), request.query.get("at_most")
    if its is None or at_most not in {None, "0"}:
        raise NotFound("There is nothing to change by this address.")

    def read(connection: sa.Connection) -> tuple[KeyFigures, sa.RowMapping | None, Bounds]:
        bounds = _bounds(1)
        [figures] = count_tasks(connection, site.schema, [its.share], bounds)
        return figures, read_limit(connection, site.schema, its.place), bounds

    figures, row, bounds = site.snapshots.get(("limit", its), read)
    values = {
        "its": its,
        "at_most": at_most,
        "figures": figures,
        "row": row,
        "bounds": bounds,
        "back": request.query.get("back", "keys"),
    }
    return Page("limit.html", "Change a limit", values, section="keys", is_live=False)


def _share(query: Mapping[str, str]) -> Share | None:
    """Read the place behind which a page begins."""
    queue, kind, name = (query.get(f"after_{each}", "") for each in ("queue", "kind", "name"))
    return Share(queue, kind, name) if queue and kind in {KEY, POOL} else None


def _place(query: Mapping[str, str]) -> tuple[str, str, str]:
    """Read the place of a limit behind which a page begins."""
    return (
        query.get("after_limit_queue", ""),
        query.get("after_limit_type", ""),
        query.get("after_limit_key", ""),
    )


def _bounds(number: int) -> Bounds:
    """Return up to how many tasks of each of so many keys are counted."""
    return Bounds(max(5, RUNNING // max(1, number)), max(10, WAITING // max(1, number)))
