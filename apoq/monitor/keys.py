"""Concurrency keys, types and queues with limits: how many of their tasks run and wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from apoq.core.places import KEY, POOL
from apoq.monitor.formatting import clean, length
from apoq.schema.statements.keys import count_blocked, failed_of, held_shares, holders
from apoq.schema.statements.limits import all_limits
from apoq.schema.statements.places import awaited, first_of_keys

MAX_KEYS: Final = 1_000
"""Keys and pools that are read at most."""


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
    running: int = 0
    running_for: float | None = None
    """Seconds since the first of the running tasks was claimed."""
    worker: str | None = None
    """The host and process of the worker that runs that task."""
    waiting: int = 0
    """How many tasks wait; at most `COUNTED` + 1."""
    waiting_for: float | None = None
    """Seconds since the first of them waits."""
    held_by: int | None = None
    """The failed task that holds up the key, if its order is strict and it holds after a failure."""

    @property
    def is_full(self) -> bool:
        """Whether no more tasks may begin."""
        return self.held_by is not None or (self.at_most is not None and self.running >= self.at_most)


def read_keys(
    connection: sa.Connection, schema: str | None, queues: Sequence[str], queue: str | None = None
) -> list[KeyFigures]:
    """Return the keys and pools of `queues`, or of one `queue`, of which tasks run or wait."""
    limits = connection.execute(all_limits(schema), {"from_queue": queue}).mappings().all()
    found: dict[tuple[str, str, str], KeyFigures] = {}

    def figures(name: str, kind: str, share: str) -> KeyFigures:
        if (its := found.get((name, kind, share))) is None:
            its = found[name, kind, share] = KeyFigures(
                name,
                share if kind == KEY else None,
                share or None if kind == POOL else None,
                _at_most(limits, name, kind, share),
            )
        return its

    for row in connection.execute(held_shares(schema), {"in_queue": queue, "at_most": MAX_KEYS}).mappings():
        its = figures(row["queue"], row["kind"], row["name"])
        its.running = row["running"]
        its.running_for = (row["now"] - row["since"]).total_seconds() if row["since"] else None
        its.worker = None if row["host"] is None else f"{row['host']} {row['pid']}"
    waiting = connection.execute(
        awaited(schema),
        {
            "queue_names": list(queues) if queue is None else [queue],
            "at_most": MAX_KEYS,
            **dict.fromkeys(("after_queue", "after_kind", "after_name"), ""),
        },
    ).all()
    names = dict(zip(("queue_names", "kinds", "names"), map(list, zip(*waiting, strict=True)), strict=False))
    for row in connection.execute(count_blocked(schema), names).mappings() if waiting else ():
        its = figures(row["queue"], row["kind"], row["name"])
        its.waiting = row["waiting"]
        its.waiting_for = (
            (row["now"] - row["waiting_since"]).total_seconds() if row["waiting_since"] else None
        )
    _find_held_up(connection, schema, found.values(), {row["queue"] for row in limits if row["holds"]})
    return [found[place] for place in sorted(found)]


def _find_held_up(
    connection: sa.Connection, schema: str | None, found: Iterable[KeyFigures], queues: set[str]
) -> None:
    """Find the failed tasks that hold up keys."""
    for queue in queues:
        keys = [its.key for its in found if its.queue == queue and its.key is not None and its.waiting]
        parameters = {"from_queue": queue, "keys": keys, "holds": [True] * len(keys)}
        found_first = connection.execute(first_of_keys(schema), parameters).mappings()
        firsts: dict[str, int] = {row["key"]: row["id"] for row in found_first}
        failed: set[int] = set(connection.scalars(failed_of(schema), {"ids": list(firsts.values())}))
        for its in found:
            if its.queue == queue and (first := firsts.get(its.key or "")) in failed:
                its.held_by = first


def _at_most(limits: Iterable[sa.RowMapping], queue: str, kind: str, name: str) -> int | None:
    mine = [row for row in limits if row["queue"] == queue and row["in_force"] is not None]
    if kind == POOL:
        numbers = [row["in_force"] for row in mine if row["type"] == name and not row["key"]]
    else:
        numbers = [row["in_force"] for row in mine if row["key"] == name]
        numbers = numbers or list({row["in_force"] for row in mine if row["is_of_key"]})
    return numbers[0] if len(numbers) == 1 else None


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
