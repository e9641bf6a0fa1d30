"""The queues that a claim or a survey looks into, as one parameter of the statement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from sqlalchemy import (
    CTE,
    JSON,
    BigInteger,
    Double,
    FromClause,
    Integer,
    Text,
    bindparam,
    cast,
    column,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.selectable import TableValuedAlias

from apoq.core.payload import encode
from apoq.schema.statements.pauses import ALL_TYPES, is_paused, paused

Levels = Mapping[int, tuple[float, int]]
"""By level, the `process_at` (in seconds since 1970) and the id behind which a claim looks for tasks."""

_COLUMNS: Final[dict[str, Any]] = {
    "queue": Text,
    "types": ARRAY(Text),
    "at_most": BigInteger,
    "levels": ARRAY(Integer),
    "behind_times": ARRAY(Double),
    "behind_ids": ARRAY(BigInteger),
    "lower_than": Integer,
}


def given_queues(schema: str | None, *, with_limited: bool = True) -> CTE:
    """Return the queues of the parameter `queues` as rows, without those that are paused.

    A claim that gives no places must leave out queues and types that have a limit, too (`with_limited` is
    False).

    A row has the name of the queue, the types of the tasks to look for, how many to claim at most, the
    levels to look at with a position in each, and the level below which to look as well. All queues
    are one parameter, in JSON, because a worker looks into one queue or into hundreds of them.
    """
    records, pauses = _records(), paused(schema, with_limited=not with_limited)
    type_ = func.unnest(records.c.types).column_valued("given_type")
    types = select(type_).where(~is_paused(pauses, records.c.queue, type_)).correlate(records)
    values = {each.name: each for each in records.c} | {"types": func.array(types.scalar_subquery())}
    rows = select(*(value.label(name) for name, value in values.items()))
    # Materialized, so that the server looks for paused types once for each queue, and not for each task.
    is_whole = literal_column(f"'{ALL_TYPES}'", Text)
    found = rows.where(~is_paused(pauses, records.c.queue, is_whole)).cte("queues")
    return found.prefix_with("MATERIALIZED")


def given_names() -> FromClause:
    """Return the names of the queues of the parameter `queues`, also of those that are paused."""
    return select(_records().c.queue).subquery("names")


def _records() -> TableValuedAlias:
    parameter = cast(bindparam("queues", type_=Text), JSON)
    columns = [column(name, type_) for name, type_ in _COLUMNS.items()]
    return func.json_to_recordset(parameter).table_valued(*columns).render_derived("given", with_types=True)


def queues_text(*queues: Iterable[str]) -> str:
    """Return the value of the parameter `queues`; each queue is given as the texts that follow here."""
    return "[" + ",".join("{" + ",".join(texts) + "}" for texts in queues) + "]"


def queue_text(name: str, types: Iterable[str]) -> str:
    """Return the name of a queue, and the types of the tasks to look for."""
    return f'"queue":{encode(name)},"types":{encode(list(types))}'


def levels_text(levels: Levels, lower_than: int | None = None) -> str:
    """Return the positions behind which to look, the highest level first."""
    numbers = sorted(levels, reverse=True)
    times = ",".join(_time(levels[number][0]) for number in numbers)
    ids = [levels[number][1] for number in numbers]
    text = f'"levels":{encode(numbers)},"behind_times":[{times}],"behind_ids":{encode(ids)}'
    return text if lower_than is None else f'{text},"lower_than":{lower_than}'


def at_most_text(count: int) -> str:
    """Return how many tasks to claim from a queue at most."""
    return f'"at_most":{count}'


def retry_limits_text(*queues: str) -> str:
    """Return the value of the parameter `retry_limits`; each queue is given as `limits_text`."""
    return f"{{{','.join(queues)}}}"


def limits_text(name: str, limits: Mapping[str, float]) -> str:
    """Return the retry limits of a queue, by type."""
    return f"{encode(name)}:{encode(limits)}"


def _time(seconds: float) -> str:
    return f'"{seconds!r}"' if math.isinf(seconds) else repr(seconds)  # JSON has no infinity
