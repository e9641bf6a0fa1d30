"""Tell in what a database's tables differ from the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from apoq.core.payload import check_schema
from apoq.postgres.urls import check_untranslated
from apoq.schema.models import Base

if TYPE_CHECKING:  # Alembic takes 0.2 s to import
    from alembic.migration import MigrationContext

_INVALID: Final = sa.text(
    "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = to_regclass(:name) AND NOT indisvalid"
)


def differences(connection: sa.Connection, schema: str | None = None) -> list[str]:
    """Return what the tables lack, or have otherwise than the model, a sentence each.

    Columns with their types, defaults and nullability, indexes, and the CHECK. Other names of indexes and of
    the CHECK are no difference: a naming convention may have given them. What somebody has added to the
    tables, such as an index or a column of their own, is theirs.
    """
    # Here, for `import apoq` shall not import Alembic.
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
    """Return whether an index that was found has the columns and rows of one that is wanted."""
    return (
        index.table.name == other.table.name  # type: ignore[union-attr]
        and context.impl.compare_indexes(index, other).is_equal
        and _where(index) == _where(other)
    )


def _where(index: sa.Index) -> set[str]:
    where = index.dialect_options["postgresql"]["where"]
    return set() if where is None else _literals(str(where))


def _sentences(diff: Any) -> list[str]:
    if isinstance(diff, list):  # what differs in one column
        return [sentence for change in diff for sentence in _sentences(change)]
    match diff:
        case ("add_table", table):
            return [f"the table {table.name} is missing"]
        case ("add_column", _, table, column):
            return [f"the column {table}.{column.name} is missing"]
        case ("add_index", index):
            return [f"the index {index.name} is missing, or another one"]
        case ("modify_nullable", _, table, column, _, is_nullable, _):
            return [f"the column {table}.{column} may {'' if is_nullable else 'not '}be NULL"]
        case ("modify_type", _, table, column, _, is_, wanted):
            return [f"the column {table}.{column} is of type {is_}, and not {wanted}"]
        case ("modify_default", _, table, column, _, is_, wanted):
            return [f"the column {table}.{column} defaults to {_default(is_)}, and not {_default(wanted)}"]
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
        f"the CHECK {check.name} is missing, or another one"
        for check in wanted
        if _literals(str(check.sqltext)) not in found
    ]


def _indexes(connection: sa.Connection, table: sa.Table) -> list[str]:
    """Look at what autogenerate does not: which rows an index holds, and whether it can be used."""
    found = {
        index["name"]: index["dialect_options"].get("postgresql_where", "")
        for index in sa.inspect(connection).get_indexes(table.name, schema=table.schema)
        if "dialect_options" in index
    }
    other = [
        f"the index {index.name} is missing, or another one"
        for index in table.indexes
        if index.name in found and _literals(found[index.name]) != _where(index)
    ]
    name = connection.dialect.identifier_preparer.format_table(table)
    invalid = connection.scalars(_INVALID, {"name": name})
    return other + [f"the index {index} is not valid: REINDEX INDEX {index}" for index in invalid]


def _literals(condition: str) -> set[str]:
    """Return the strings in a condition, which PostgreSQL writes in a form of its own."""
    return set(re.findall(r"'([^']*)'", condition))
