"""Concurrency keys, types and queues with limits: how many of their tasks run and wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from apoq.core.places import KEY, POOL, WHOLE_QUEUE
from apoq.monitor.formatting import clean, length
from apoq.schema.statements.keys import count_shares, failed_of, find_shares, holders, limits_of_shares
from apoq.schema.statements.limits import browse_limits, find_limit
from apoq.schema.statements.places import first_of_keys

MAX_KEYS: Final = 1_000
"""Keys and pools that are read at most."""

MAX_LIMITS: Final = 1_000
"""Limits of types, and of single keys, that are read for these at most."""


class Share(NamedTuple):
    """A key, or a type or queue with a limit (a pool), of a queue."""

    queue: str
    kind: str
    """`KEY` or `POOL`."""
    name: str


class Bounds(NamedTuple):
    """Up to how many running and waiting tasks of each key or pool are counted."""

    running: int
    waiting: int


COUNTED: Final = Bounds(running=10_000, waiting=1_000)


@dataclass
class KeyFigures:
    """A key, a type or a queue with a limit, of which tasks run or wait."""

    queue: str
    key: str | None
    """The key; None for the limit of a type or a queue."""
    type: str | None
    """The type; None for the limit of a key or a queue."""
    at_most: int | None
    """How many may run at once; None if that differs by type, or there is no limit any more."""
    running: int
    """How many tasks run; one more than were counted means that there may be any number."""
    running_for: float | None
    """Seconds since the first of the running tasks was claimed."""
    task_id: int | None
    """That task."""
    worker: str | None
    """The host and process of the worker that runs it."""
    waiting: int
    """How many tasks wait; one more than were counted means that there may be any number."""
    waiting_for: float | None
    """Seconds since the first of them waits."""
    held_by: int | None = None
    """The failed task that holds up the key, if its order is strict and it holds after a failure."""

    @property
    def is_full(self) -> bool:
        """Whether no more tasks may begin."""
        return self.held_by is not None or (self.at_most is not None and self.running >= self.at_most)

    @property
    def is_in_use(self) -> bool:
        """Whether tasks run or wait."""
        return bool(self.running or self.waiting)


def read_keys(connection: sa.Connection, schema: str | None, queue: str | None = None) -> list[KeyFigures]:
    """Return the keys and pools of which tasks run or wait, of one `queue` or of all."""
    return count_tasks(connection, schema, find_keys(connection, schema, MAX_KEYS, queue=queue), COUNTED)


def find_keys(
    connection: sa.Connection,
    schema: str | None,
    at_most: int,
    *,
    after: Share | None = None,
    queue: str | None = None,
    with_running: bool = True,
) -> list[Share]:
    """Return the first keys and pools behind `after` of which tasks wait, or also run, in their order."""
    start = after or Share(queue or "", "", "")
    parameters = {
        **{f"after_{name}": value for name, value in start._asdict().items()},
        "at_most": at_most,
        "with_running": with_running,
    }
    rows = connection.execute(find_shares(schema, after_keys=start.kind == POOL), parameters)
    return [Share(*row) for row in rows if queue in {None, row.queue}]


def count_tasks(
    connection: sa.Connection, schema: str | None, shares: Sequence[Share], bounds: Bounds
) -> list[KeyFigures]:
    """Return how many tasks of these keys and pools run and wait."""
    if not shares:
        return []
    queues, kinds, names = map(list, zip(*shares, strict=True))
    given = {"queue_names": queues, "names": names}
    limited = {**given, "at_most": MAX_LIMITS}
    limits = connection.execute(limits_of_shares(schema), limited).mappings().all()
    counted = {"kinds": kinds, **{name: bound + 1 for name, bound in bounds._asdict().items()}}
    rows = connection.execute(count_shares(schema), {**given, **counted}).mappings()
    by_share = {Share(row["queue"], row["kind"], row["name"]): row for row in rows}
    found = [_figures(share, by_share[share], limits) for share in shares]
    _find_held_up(connection, schema, found, {row["queue"] for row in limits if row["holds"]})
    return found


def _figures(share: Share, row: sa.RowMapping, limits: Iterable[sa.RowMapping]) -> KeyFigures:
    def since(name: str) -> float | None:
        return None if row[name] is None else (row["now"] - row[name]).total_seconds()

    return KeyFigures(
        share.queue,
        share.name if share.kind == KEY else None,
        share.name if share.kind == POOL and share.name != WHOLE_QUEUE else None,
        _at_most(limits, share, {*(row["running_types"] or ()), *(row["waiting_types"] or ())}),
        row["running"],
        since("running_since"),
        row["task_id"],
        None if row["host"] is None else f"{row['host']} {row['pid']}",
        row["waiting"],
        since("waiting_since"),
    )


def _find_held_up(
    connection: sa.Connection, schema: str | None, found: Iterable[KeyFigures], queues: set[str]
) -> None:
    """Find the failed tasks that hold up keys."""
    for queue in queues:
        keys = [its.key for its in found if its.queue == queue and its.key is not None and its.waiting]
        parameters = {"from_queue": queue, "keys": keys, "holds": [True] * len(keys)}
        found_first = connection.execute(first_of_keys(schema), parameters).mappings()
        firsts: dict[str, int] = {row["key"]: row["id"] for row in found_first if row["id"] is not None}
        failed: set[int] = set(connection.scalars(failed_of(schema), {"ids": list(firsts.values())}))
        for its in found:
            if its.queue == queue and (first := firsts.get(its.key or "")) in failed:
                its.held_by = first


def _at_most(limits: Iterable[sa.RowMapping], share: Share, types: set[str]) -> int | None:
    mine = [row for row in limits if row["queue"] == share.queue and row["in_force"] is not None]
    if share.kind == POOL:
        numbers = [row["in_force"] for row in mine if row["type"] == share.name and not row["key"]]
    else:
        numbers = [row["in_force"] for row in mine if row["key"] == share.name]
        of_types = {row["in_force"] for row in mine if row["is_of_key"] and row["type"] in types}
        numbers = numbers or list(of_types)
    return numbers[0] if len(numbers) == 1 else None


def read_limits(
    connection: sa.Connection,
    schema: str | None,
    at_most: int,
    *,
    after: tuple[str, str, str] = ("", "", ""),
    queue: str | None = None,
) -> Sequence[sa.RowMapping]:
    """Return the first limits behind the queue, the type and the key of `after`."""
    edge = dict(zip(("after_queue", "after_type", "after_key"), after, strict=True))
    parameters = {**edge, "from_queue": queue, "at_most": at_most}
    return connection.execute(browse_limits(schema), parameters).mappings().all()


def read_limit(
    connection: sa.Connection, schema: str | None, place: tuple[str, str, str]
) -> sa.RowMapping | None:
    """Return the limit with this queue, type and key, if it exists."""
    parameters = dict(zip(("from_queue", "limited_type", "limited_key"), place, strict=True))
    return connection.execute(find_limit(schema), parameters).mappings().one_or_none()


def limited(row: sa.RowMapping) -> str:
    """Return what a limit is for, in words."""
    if row["key"]:
        return f"key {clean(row['key'])}"
    if not row["type"]:
        return "whole queue"
    return f"each key of {clean(row['type'])}" if row["is_of_key"] else f"type {clean(row['type'])}"


def waits_for(row: sa.RowMapping, held_by: Sequence[sa.RowMapping]) -> str:
    """Write which place a waiting task waits for, since when, and which tasks hold it."""
    of = (
        f"its key {clean(row['key'] or '')!r}"
        if row["waiting_for"] == KEY
        else f"its type {clean(row['type'])!r}"
    )
    since = row["waiting_since"]
    for_ = "" if since is None else f" for {length((row['now'] - since).total_seconds())}"
    tasks = ", ".join(
        f"task {each['id']}" + ("" if each["host"] is None else f" ({clean(each['host'])} {each['pid']})")
        for each in held_by
    )
    return f"a place of {of}{for_}" + (f", held by {tasks}" if tasks else "")


def read_holders(connection: sa.Connection, schema: str | None, row: Any) -> Sequence[sa.RowMapping]:
    """Return the running tasks that hold the places for which a task waits."""
    if row["waiting_for"] not in {KEY, POOL}:
        return ()
    share = row["key"] if row["waiting_for"] == KEY else row["pool_key"]
    parameters = {"from_queue": row["queue"], "kind": row["waiting_for"], "name": share}
    return connection.execute(holders(schema), parameters).mappings().all()
