"""Reads whether a role may change tasks, pauses, schedules and limits."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import Boolean, ColumnElement, Select, Table, and_, func, literal, not_, select

from apoq.schema.models import schedules_table, tasks_table
from apoq.schema.statements.count import oid
from apoq.schema.tables import limits_table, pauses_table


@cache
def may_change(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return whether this role may change tasks, pauses, schedules and limits, and add tasks of schedules.

    NULL if there is no such table. False on a standby.
    """
    is_primary = not_(func.pg_is_in_recovery(type_=Boolean))

    def may(table: Table, *rights: str, of_column: str | None = None) -> ColumnElement[bool]:
        its = oid(table)
        checks = [func.has_table_privilege(its, literal(right), type_=Boolean) for right in rights]
        if of_column is not None:
            name, _, right = of_column.partition(" ")
            checks.append(func.has_column_privilege(its, literal(name), literal(right), type_=Boolean))
        return and_(is_primary, *checks)

    tasks = tasks_table(schema)
    # `apoq grants` lists the columns of tasks that an operator writes.
    return select(
        may(tasks, "SELECT", of_column="state UPDATE").label("tasks"),
        may(pauses_table(schema), "SELECT", "INSERT", "UPDATE", "DELETE").label("pauses"),
        may(schedules_table(schema), "SELECT", "UPDATE").label("schedules"),
        may(tasks, "SELECT", of_column="schedule INSERT").label("runs"),
        may(limits_table(schema), "SELECT", "INSERT", "UPDATE", "DELETE").label("limits"),
    )
