"""Reads the server's version and settings, and conditions on the server that would harm a queue."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnClause,
    Double,
    Integer,
    Select,
    TableClause,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    column,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    table,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, REGCLASS, TIMESTAMP
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import TypeEngine

from apoq.schema.models import tasks_table
from apoq.schema.statements.count import oid
from apoq.schema.statements.literals import seconds_between

_SETTINGS = (
    "server_version",
    "server_version_num",
    "server_encoding",
    "autovacuum",
    "max_connections",
    "superuser_reserved_connections",
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",
)
_KINDS: dict[str, TypeEngine[Any]] = {
    "datname": Text(),
    "usename": Text(),
    "application_name": Text(),
    "state": Text(),
    "pid": Integer(),
    "gid": Text(),
    "database": Text(),
    "slot_name": Text(),
    "numbackends": Integer(),
    "n_live_tup": BigInteger(),
    "n_dead_tup": BigInteger(),
    "reloptions": ARRAY(Text()),
    **dict.fromkeys(("xact_start", "prepared", "last_autovacuum"), TIMESTAMP(timezone=True)),
}


@cache
def server() -> Select[*tuple[Any, ...]]:
    """Return the server's version and its settings for this session; NULL if a setting doesn't exist."""
    return select(
        func.version(type_=Text).label("version"),
        *(func.current_setting(name, True, type_=Text).label(name) for name in _SETTINGS),
    )


@cache
def clock() -> Select[*tuple[Any, ...]]:
    """Return the server's current time, in seconds since 1970."""
    return select(func.date_part("epoch", func.clock_timestamp(), type_=Double))


@cache
def connections() -> Select[*tuple[Any, ...]]:
    """Return how many of the server's connections are in use."""
    return select(func.sum(_catalogue("pg_stat_database", "numbackends").c.numbackends, type_=BigInteger))


@cache
def vacuuming(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the live and dead tuples of the task table, its last autovacuum, and its own settings."""
    tables = _catalogue("pg_stat_all_tables", "relid", "n_live_tup", "n_dead_tup", "last_autovacuum")
    classes = _catalogue("pg_class", "oid", "reloptions")
    return (
        select(
            tables.c.n_live_tup,
            tables.c.n_dead_tup,
            _age(tables.c.last_autovacuum).label("vacuumed_ago"),
            func.coalesce(classes.c.reloptions, cast([], ARRAY(Text))).label("options"),
        )
        .select_from(tables.join(classes, classes.c.oid == tables.c.relid))
        .where(tables.c.relid == oid(tasks_table(schema)))
    )


@cache
def indexes_naming(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the indexes of the task table, as identifiers in SQL, that contain one of the `columns`.

    The column may be a key, in an expression, or in the index's condition.
    """
    depends = _catalogue("pg_depend", "classid", "objid", "refclassid", "refobjid", "refobjsubid")
    classes = _catalogue("pg_class", "oid", "relkind")
    attributes = _catalogue("pg_attribute", "attrelid", "attnum", "attname")
    relations = func.to_regclass("pg_catalog.pg_class", type_=BigInteger)
    is_named = and_(attributes.c.attrelid == depends.c.refobjid, attributes.c.attnum == depends.c.refobjsubid)
    name = cast(cast(classes.c.oid, REGCLASS), Text)
    return (
        select(name)
        .distinct()
        .select_from(depends.join(classes, classes.c.oid == depends.c.objid).join(attributes, is_named))
        .where(
            depends.c.classid == relations,
            depends.c.refclassid == relations,
            depends.c.refobjid == oid(tasks_table(schema)),
            classes.c.relkind == literal_column("'i'"),
            attributes.c.attname == any_(bindparam("columns", type_=ARRAY(Text))),
        )
        .order_by(name)
    )


@cache
def holders() -> Select[*tuple[Any, ...]]:
    """Return up to 5 transactions and slots that have kept vacuum from removing rows for `longer_than`.

    The oldest come first. The columns are `kind`, `name`, `age` in seconds (NULL for a replication slot,
    whose age is unknown), and, for a session, `pid` and `state`.
    """
    sessions = _catalogue(
        "pg_stat_activity",
        *(
            "datname",
            "usename",
            "application_name",
            "state",
            "pid",
            "xact_start",
            "backend_xmin",
            "backend_xid",
        ),
    )
    prepared = _catalogue("pg_prepared_xacts", "gid", "database", "prepared")
    slots = _catalogue("pg_replication_slots", "slot_name", "xmin", "active")
    here = func.current_database()
    longer_than = cast(bindparam("longer_than"), INTERVAL)
    name = func.concat_ws(" ", sessions.c.usename, func.nullif(sessions.c.application_name, ""))
    no_session = cast(null(), Integer).label("pid"), cast(null(), Text).label("state")
    found = union_all(
        select(
            literal("session", Text).label("kind"),
            name.label("name"),
            _age(sessions.c.xact_start).label("age"),
            sessions.c.pid,
            sessions.c.state,
        ).where(
            sessions.c.datname == here,
            sessions.c.pid != func.pg_backend_pid(),
            or_(sessions.c.backend_xmin.is_not(None), sessions.c.backend_xid.is_not(None)),
            sessions.c.xact_start < func.clock_timestamp() - longer_than,
        ),
        select(
            literal("prepared transaction", Text), prepared.c.gid, _age(prepared.c.prepared), *no_session
        ).where(prepared.c.database == here, prepared.c.prepared < func.clock_timestamp() - longer_than),
        select(literal("replication slot", Text), slots.c.slot_name, cast(null(), Double), *no_session).where(
            slots.c.xmin.is_not(None), slots.c.active.is_(False)
        ),
    ).subquery("found")
    return select(*found.c).order_by(found.c.age.desc()).limit(5)


def _catalogue(name: str, *columns: str) -> TableClause:
    typed: Iterator[ColumnClause[Any]] = (column(each, _KINDS.get(each)) for each in columns)
    return table(name, *typed, schema="pg_catalog")


def _age(time: ColumnElement[Any]) -> ColumnElement[float | None]:
    return seconds_between(time, func.clock_timestamp())
