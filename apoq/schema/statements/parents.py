"""Reads the edges from a task to its parents."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Integer, Select, Text, bindparam, cast, func, select, tuple_

from apoq.schema.tables import links_table


@cache
def parent_results(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the results of the parents of `task_id` as texts, `at_most` behind a position and a parent."""
    links = links_table(schema)
    behind = tuple_(bindparam("behind_position", type_=Integer), bindparam("behind_parent", type_=BigInteger))
    return (
        select(links.c.position, links.c.parent_id, cast(links.c.result, Text).label("result"))
        .where(_of_task(links), tuple_(links.c.position, links.c.parent_id) > behind)
        .order_by(links.c.position, links.c.parent_id)
        .limit(bindparam("at_most", type_=Integer))
    )


@cache
def parent_counts(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return how many parents of `task_id` have completed, and how many have ended in another way."""
    links = links_table(schema)
    has_failed = links.c.error.is_not(None)
    return select(
        func.count().filter(links.c.is_done, ~has_failed).label("completed"),
        func.count().filter(has_failed).label("failed"),
    ).where(_of_task(links))


def _of_task(links: Any) -> Any:
    return links.c.child_id == bindparam("task_id", type_=BigInteger)
