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

    def has(table: Table, right: str) -> ColumnElement[bool]:
        # Operators may write some columns only; see `apoq.schema.grants`.
        check = func.has_table_privilege if right == "DELETE" else func.has_any_column_privilege
        return check(oid(table), literal(right), type_=Boolean)

    def may(table: Table, *rights: str) -> ColumnElement[bool]:
        return and_(is_primary, *(has(table, right) for right in rights))

    tasks = tasks_table(schema)
    return select(
        may(tasks, "SELECT", "UPDATE").label("tasks"),
        may(pauses_table(schema), "SELECT", "INSERT", "UPDATE", "DELETE").label("pauses"),
        may(schedules_table(schema), "SELECT", "UPDATE").label("schedules"),
        may(tasks, "SELECT", "INSERT").label("runs"),
        may(limits_table(schema), "SELECT", "INSERT", "UPDATE", "DELETE").label("limits"),
    )
