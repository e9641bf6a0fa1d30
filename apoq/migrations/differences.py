"""Finds differences between a database's tables and the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from apoq.core.payload import check_schema
from apoq.postgres.urls import check_untranslated
from apoq.schema.models import Base

if TYPE_CHECKING:  # importing Alembic takes 0.2 s
    from alembic.migration import MigrationContext

_INVALID: Final = sa.text(
    "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = to_regclass(:name) AND NOT indisvalid"
)


def differences(connection: sa.Connection, schema: str | None = None) -> list[str]:
    """Return the differences between apoq's tables in a database and the model of this version.

    It compares columns with their types, defaults and nullability, indexes, and CHECK constraints. Indexes
    and CHECK constraints may have other names, because a naming convention may have changed them. Additional
    columns and indexes, such as your own, don't count.

    Args:
        connection: A connection to the database.
        schema: The schema of the tables; by default, the search_path is used.

    Returns:
        A sentence for each difference; an empty list if there are none.
    """
    # Imported here, so that `import apoq` doesn't import Alembic.
    from alembic.autogenerate import compare_metadata  # noqa: PLC0415
    from alembic.migration import MigrationContext  # noqa: PLC0415

    schema = check_schema(schema)
    check_untranslated(connection.get_execution_options(), schema)
    metadata = sa.MetaData()
    tables = [
        table.to_metadata(metadata, schema=schema or sa.schema.SchemaConst.RETAIN_SCHEMA)
        for table in Base.metadata.sorted_tables
    ]
    names = {table.name for table in tables}

    def include_name(name: str | None, type_: str, _parents: object) -> bool:
        if type_ == "schema":
            return name == schema
        return type_ != "table" or name in names

    context = MigrationContext.configure(
        connection,
        opts={
            "include_name": include_name,
            "include_schemas": schema is not None,
            "compare_server_default": True,
        },
    )
    diffs = compare_metadata(context, metadata)
    others = [diff[1] for diff in diffs if diff[0] == "remove_index"]
    found = [
        sentence
        for diff in diffs
        if not (diff[0] == "add_index" and any(_is_same(context, diff[1], other) for other in others))
        for sentence in _sentences(diff)
    ]
    missing = {
        table for table in tables if not sa.inspect(connection).has_table(table.name, schema=table.schema)
    }
    for table in tables:
        if table not in missing:
            found += _checks(connection, table) + _indexes(connection, table)
    return sorted(set(found))


def _is_same(context: MigrationContext, index: sa.Index, other: sa.Index) -> bool:
    """Return whether an existing index has the same columns and rows as an expected one."""
    return (
        index.table.name == other.table.name  # type: ignore[union-attr]
        and context.impl.compare_indexes(index, other).is_equal
        and _where(index) == _where(other)
    )


def _where(index: sa.Index) -> set[str]:
    where = index.dialect_options["postgresql"]["where"]
    return set() if where is None else _literals(str(where))


def _sentences(diff: Any) -> list[str]:
    if isinstance(diff, list):  # the changes of one column
        return [sentence for change in diff for sentence in _sentences(change)]
    match diff:
        case ("add_table", table):
            return [f"the table {table.name} is missing"]
        case ("add_column", _, table, column):
            return [f"the column {table}.{column.name} is missing"]
        case ("add_index", index):
            return [f"the index {index.name} is missing or differs from the model"]
        case ("modify_nullable", _, table, column, _, is_nullable, _):
            must = "must not" if is_nullable else "must"
            return [f"the column {table}.{column} {must} accept NULL"]
        case ("modify_type", _, table, column, _, is_, wanted):
            return [f"the type of {table}.{column} must be {wanted}, got {is_}"]
        case ("modify_default", _, table, column, _, is_, wanted):
            return [f"the default of {table}.{column} must be {_default(wanted)}, got {_default(is_)}"]
    return []


def _default(default: Any) -> str:
    argument = getattr(default, "arg", None)
    return "nothing" if argument is None else str(getattr(argument, "text", argument))


def _checks(connection: sa.Connection, table: sa.Table) -> list[str]:
    found = [
        _literals(check["sqltext"])
        for check in sa.inspect(connection).get_check_constraints(table.name, schema=table.schema)
    ]
    wanted = [check for check in table.constraints if isinstance(check, sa.CheckConstraint)]
    return [
        f"the CHECK {check.name} is missing or differs from the model"
        for check in wanted
        if _literals(str(check.sqltext)) not in found
    ]


def _indexes(connection: sa.Connection, table: sa.Table) -> list[str]:
    """Compare what autogenerate ignores: which rows an index contains, and whether it is valid."""
    found = {
        index["name"]: index["dialect_options"].get("postgresql_where", "")
        for index in sa.inspect(connection).get_indexes(table.name, schema=table.schema)
        if "dialect_options" in index
    }
    other = [
        f"the index {index.name} is missing or differs from the model"
        for index in table.indexes
        if index.name in found and _literals(found[index.name]) != _where(index)
    ]
    name = connection.dialect.identifier_preparer.format_table(table)
    invalid = connection.scalars(_INVALID, {"name": name})
    return other + [f"the index {index} is not valid: run REINDEX INDEX {index}" for index in invalid]


def _literals(condition: str) -> set[str]:
    """Return the string literals in a condition, to compare it although PostgreSQL has rewritten it."""
    return set(re.findall(r"'([^']*)'", condition))
