"""Counts the tasks of a list, before all of them are changed."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

import sqlalchemy as sa

from apoq.core.states import CANCELLED, COMPLETED, FAILED, WAITING
from apoq.monitor.browse import EXAMINED, Wanted, find_matching, first_queues
from apoq.schema.statements.browse import count_in_state

COUNTED: Final = 10_000
"""Up to how many tasks are counted if an index has all that is wanted."""

INDEXED: Final = {WAITING, COMPLETED, FAILED, CANCELLED}
"""The states that indexes have."""


class Matching(NamedTuple):
    """How many tasks of a list there are."""

    number: int
    is_all: bool
    """Whether there are no others."""
    has_more_queues: bool
    """Whether only tasks of the first queues were counted."""
    now: datetime
    """The time of the count."""


def count_matching(connection: sa.Connection, schema: str | None, wanted: Wanted) -> Matching:
    """Count the tasks of a list: up to `COUNTED`, or among `EXAMINED` tasks if they have to be read."""
    queues, has_more = first_queues(connection, schema) if wanted.queue is None else ([wanted.queue], False)
    if wanted.state in INDEXED and not wanted.is_filtered:
        parameters = {"in_queues": queues, "counted": COUNTED + 1}
        row = connection.execute(count_in_state(schema, wanted.state), parameters).one()
        number, is_all = min(row.number, COUNTED), row.examined <= COUNTED
    else:
        found = find_matching(connection, schema, wanted, at_most=EXAMINED)
        number, is_all = len(found.ids), found.next is None and not found.is_partial
    now: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return Matching(number, is_all and not has_more, has_more, now)
