"""Reads conditions that keep a role from working on a database, or from migrating it.

All of them read PostgreSQL's catalogues, which every role may read, because a role without rights must be
able to see which ones it lacks.
"""

from __future__ import annotations

from functools import cache

from sqlalchemy import (
    BigInteger,
    Boolean,
    Integer,
    Select,
    Text,
    TextClause,
    bindparam,
    cast,
    column,
    func,
    select,
    table,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY

from apoq.schema.models import tasks_table


@cache
def session() -> TextClause:
    """Return the roles and the database of this session, quoted, and whether and why it can't write.

    It also returns the search_path and the schema in which new tables are created: NULL if no schema of the
    search_path exists. `read_only_source` is the value of `pg_settings.source` for
    `default_transaction_read_only`.
    """
    return text("""
        SELECT quote_ident(current_user) AS role,
               quote_ident(session_user) AS login,
               quote_ident(current_database()) AS database,
               current_setting('search_path') AS search_path,
               current_schema() AS current_schema,
               pg_is_in_recovery() AS is_standby,
               current_setting('transaction_read_only') = 'on' AS is_read_only,
               CASE setting WHEN 'on' THEN source END AS read_only_source
        FROM pg_catalog.pg_settings WHERE name = 'default_transaction_read_only'
    """)


@cache
def has_column() -> TextClause:
    """Return whether the table `name` has this `column`.

    In the schema `schema`, or, if `schema` is null, in the first of the search_path that has the table.
    """
    return text("""
        SELECT EXISTS (
            SELECT FROM pg_catalog.pg_attribute
              JOIN pg_catalog.pg_class ON pg_class.oid = attrelid
              JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
             WHERE relname = :name AND attname = :column AND NOT attisdropped
               AND CASE WHEN CAST(:schema AS text) IS NULL THEN pg_catalog.pg_table_is_visible(pg_class.oid)
                        ELSE nspname = :schema END
        )
    """)


@cache
def tables() -> TextClause:
    """Return the kind of each of the tables `names`, and the rights of this role on it.

    The tables are in the schema `schema`, or, if that is NULL, in the first schema of the search_path that
    has them.
    """
    return text("""
        SELECT DISTINCT ON (relname)
               relname AS name,
               format('%I.%I', nspname, relname) AS qualified,
               quote_ident(nspname) AS schema,
               CAST(tables.oid AS bigint) AS oid,
               CAST(relkind AS text) AS kind,
               (SELECT CAST(CAST(inhparent AS regclass) AS text)
                FROM pg_catalog.pg_inherits WHERE inhrelid = tables.oid LIMIT 1) AS parent,
               relispartition AS is_partition,
               ARRAY(SELECT CAST(CAST(inhrelid AS regclass) AS text)
                     FROM pg_catalog.pg_inherits WHERE inhparent = tables.oid) AS children,
               has_schema_privilege(schemas.oid, 'USAGE') AS is_reachable,
               ARRAY(SELECT privilege FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
                     WHERE has_table_privilege(tables.oid, privilege)) AS rights,
               has_any_column_privilege(tables.oid, 'INSERT')
                   AND has_any_column_privilege(tables.oid, 'SELECT') AS may_insert,
               ARRAY(SELECT format('%I.%I', owned_schemas.nspname, owned.relname)
                     FROM pg_catalog.pg_depend
                     JOIN pg_catalog.pg_class AS owned ON owned.oid = objid
                     JOIN pg_catalog.pg_namespace AS owned_schemas ON owned_schemas.oid = owned.relnamespace
                     WHERE classid = CAST('pg_catalog.pg_class' AS regclass) AND refclassid = classid
                       AND refobjid = tables.oid
                       AND CASE owned.relkind WHEN 'S' THEN NOT has_sequence_privilege(objid, 'USAGE') END
                    ) AS closed_sequences,
               -- A policy for all commands that lets everything through is as good as none, unless a
               -- restrictive one applies as well.
               row_security_active(tables.oid) AND NOT coalesce((
                   SELECT bool_and(polpermissive)
                          AND bool_or(polcmd = '*' AND pg_get_expr(polqual, polrelid) = 'true'
                                      AND coalesce(pg_get_expr(polwithcheck, polrelid), 'true') = 'true')
                   FROM pg_catalog.pg_policy
                   WHERE polrelid = tables.oid
                     AND EXISTS (SELECT FROM unnest(polroles) AS of_role
                                 WHERE CASE of_role WHEN 0 THEN true ELSE pg_has_role(of_role, 'USAGE') END)
               ), false) AS is_guarded
        FROM pg_catalog.pg_class AS tables
        JOIN pg_catalog.pg_namespace AS schemas ON schemas.oid = relnamespace
        WHERE relname = ANY (:names) AND relkind IN ('r', 'p', 'v', 'm', 'f')
          AND CASE
              WHEN CAST(:schema AS text) IS NOT NULL THEN nspname = :schema
              WHEN has_schema_privilege(schemas.oid, 'USAGE') THEN pg_table_is_visible(tables.oid)
              -- PostgreSQL passes over it in the search_path, because this role may not use it.
              ELSE strpos(
                  ',' || replace(current_setting('search_path'), ' ', '') || ',',
                  ',' || quote_ident(nspname) || ','
              ) > 0
          END
        ORDER BY relname, is_reachable DESC
    """).bindparams(bindparam("names", type_=ARRAY(Text)), bindparam("schema", type_=Text))


@cache
def id_sequence() -> TextClause:
    """Return the sequence that gives the ids of the table `oid`, and whether this role may use it.

    `quoted` is an identifier in SQL. No row if the ids are an identity, whose sequence needs no right.
    """
    return text("""
        SELECT quote_ident(nspname) || '.' || quote_ident(relname) AS quoted,
               has_sequence_privilege(sequences.oid, 'USAGE, UPDATE') AS is_usable
        FROM pg_catalog.pg_attribute
        JOIN pg_catalog.pg_attrdef AS defaults ON adrelid = attrelid AND adnum = attnum
        JOIN pg_catalog.pg_depend
            ON classid = CAST('pg_catalog.pg_attrdef' AS regclass) AND objid = defaults.oid
        JOIN pg_catalog.pg_sequence ON seqrelid = refobjid
        JOIN pg_catalog.pg_class AS sequences ON sequences.oid = seqrelid
        JOIN pg_catalog.pg_namespace AS schemas ON schemas.oid = relnamespace
        WHERE attrelid = CAST(:oid AS oid) AND attname = 'id'
    """)


@cache
def closed_database() -> TextClause:
    """Return this database, as an identifier in SQL, if not every role may connect to it; or else no row."""
    return text("""
        SELECT quote_ident(current_database())
        WHERE NOT has_database_privilege('public', current_database(), 'CONNECT')
    """)


@cache
def guarded() -> TextClause:
    """Return the names of those of the tables `oids` that have row-level security."""
    return text("""
        SELECT CAST(relname AS text) FROM pg_catalog.pg_class
        WHERE CAST(oid AS bigint) = ANY (CAST(:oids AS bigint[])) AND relrowsecurity
    """)


@cache
def row_security() -> TextClause:
    """Return what row-level security lets `role` do by each of the `commands` on the tables `names`.

    The tables are identifiers in SQL. `is_open`: a policy lets every row through. `is_partial`: one lets some
    through. `restrictive`: the policies that hide rows in spite of that, as identifiers in SQL. No row for a
    role to which the policies don't apply, such as the owner. A role that doesn't exist yet has those of
    PUBLIC.
    """
    return text("""
        SELECT wanted.name, command,
               coalesce(bool_or(polpermissive AND passes), false) AS is_open,
               coalesce(bool_or(polpermissive), false) AS is_partial,
               coalesce(array_agg(quote_ident(polname)) FILTER (WHERE NOT polpermissive AND NOT passes), '{}')
                   AS restrictive
        FROM unnest(CAST(:names AS text[]), CAST(:commands AS text[])) AS wanted (name, command)
        JOIN pg_catalog.pg_class AS tables ON tables.oid = CAST(wanted.name AS regclass)
        LEFT JOIN pg_catalog.pg_roles ON rolname = :role
        LEFT JOIN LATERAL (
            SELECT polname, polpermissive,
                   CASE command
                       WHEN 'INSERT' THEN written = 'true'
                       WHEN 'UPDATE' THEN seen = 'true' AND written = 'true'
                       ELSE seen = 'true'
                   END AS passes
            FROM (
                SELECT *, pg_get_expr(polqual, polrelid) AS seen,
                       pg_get_expr(coalesce(polwithcheck, polqual), polrelid) AS written
                FROM pg_catalog.pg_policy
            ) AS policies
            WHERE polrelid = tables.oid
              AND polcmd IN ('*', CASE command WHEN 'SELECT' THEN 'r' WHEN 'INSERT' THEN 'a'
                                               WHEN 'UPDATE' THEN 'w' ELSE 'd' END)
              AND EXISTS (SELECT FROM unnest(polroles) AS of_role
                          WHERE CASE of_role WHEN 0 THEN true
                                ELSE pg_has_role(pg_roles.oid, of_role, 'USAGE') END)
        ) AS its ON true
        WHERE relrowsecurity AND NOT coalesce(
            rolsuper OR rolbypassrls
                OR (NOT relforcerowsecurity AND pg_has_role(pg_roles.oid, relowner, 'USAGE')),
            false
        )
        GROUP BY wanted.name, command
    """)


@cache
def quoted_names() -> TextClause:
    """Return these `names` as identifiers in SQL, in their order."""
    return text("""
        SELECT array_agg(quote_ident(name) ORDER BY number)
        FROM unnest(CAST(:names AS text[])) WITH ORDINALITY AS given (name, number)
    """)


@cache
def missing_roles() -> TextClause:
    """Return those of the roles `names` that don't exist."""
    return text("""
        SELECT coalesce(array_agg(name), '{}') FROM unnest(CAST(:names AS text[])) AS name
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = name)
    """)


@cache
def lacked_privileges() -> TextClause:
    """Return those of the `privileges`, each on one of the `objects` or its column, that `role` lacks.

    The privilege CONNECT is on a database, and USAGE on a schema; SEQUENCE is the usage of a sequence. All
    others are on tables.
    """
    return text("""
        SELECT privilege, object, column_name
        FROM unnest(CAST(:privileges AS text[]), CAST(:objects AS text[]), CAST(:columns AS text[]))
            AS wanted (privilege, object, column_name)
        WHERE NOT CASE
            WHEN privilege = 'CONNECT' THEN has_database_privilege(:role, current_database(), privilege)
            WHEN privilege = 'USAGE' THEN has_schema_privilege(:role, CAST(object AS regnamespace), 'USAGE')
            WHEN privilege = 'SEQUENCE'
                THEN has_sequence_privilege(:role, CAST(object AS regclass), 'USAGE, UPDATE')
            WHEN column_name IS NULL
                THEN has_table_privilege(:role, CAST(object AS regclass), privilege)
            ELSE has_column_privilege(:role, CAST(object AS regclass), column_name, privilege)
        END
    """)


@cache
def existing_policies() -> TextClause:
    """Return which of the policies `names` the table `name` has."""
    return text("""
        SELECT coalesce(array_agg(CAST(polname AS text)), '{}') FROM pg_catalog.pg_policy
        WHERE polrelid = CAST(CAST(:name AS text) AS regclass) AND polname = ANY (CAST(:names AS text[]))
    """)


@cache
def places() -> TextClause:
    """Return the schemas of this database that have an apoq_tasks, and which of the tables `names` they have.

    The schemas of the search_path come first, in its order. `is_named` says whether the search_path names the
    schema, even if this role may not use it (`is_usable`) and so can't see it (`is_visible`).
    """
    return text("""
        SELECT nspname AS schema,
               quote_ident(nspname) AS quoted,
               array_agg(CAST(relname AS text)) AS tables,
               bool_or(nspname = ANY (current_schemas(false))) AS is_visible,
               bool_or(strpos(
                   ',' || replace(
                       replace(current_setting('search_path'), ' ', ''), '"$user"', quote_ident(current_user)
                   ) || ',',
                   ',' || quote_ident(nspname) || ','
               ) > 0) AS is_named,
               bool_or(has_schema_privilege(schemas.oid, 'USAGE')) AS is_usable
        FROM pg_catalog.pg_class JOIN pg_catalog.pg_namespace AS schemas ON schemas.oid = relnamespace
        WHERE relname = ANY (:names) AND relkind IN ('r', 'p', 'v', 'm', 'f') AND left(nspname, 3) <> 'pg_'
        GROUP BY nspname
        HAVING bool_or(relname = 'apoq_tasks')
        ORDER BY array_position(current_schemas(false), nspname), nspname
    """).bindparams(bindparam("names", type_=ARRAY(Text)))


@cache
def id_source() -> TextClause:
    """Return whether the ids of the table `oid` have a default, and its sequence.

    `schema` and `name` are those of the sequence; `quoted` is both, as an identifier in SQL. They are NULL if
    the default is not a sequence, or if this role may not read the sequence or the ids.
    """
    return text("""
        SELECT has_default, nspname AS schema, relname AS name,
               quote_ident(nspname) || '.' || quote_ident(relname) AS quoted
        FROM (
            SELECT atthasdef OR attidentity <> '' AS has_default,
                   has_column_privilege(attrelid, attnum, 'SELECT') AS is_readable,
                   -- A default depends on its sequence, and the sequence of an identity on its column.
                   coalesce(
                       (SELECT refobjid
                        FROM pg_catalog.pg_depend JOIN pg_catalog.pg_sequence ON seqrelid = refobjid
                        WHERE classid = CAST('pg_catalog.pg_attrdef' AS regclass) AND objid = defaults.oid
                        LIMIT 1),
                       (SELECT objid
                        FROM pg_catalog.pg_depend JOIN pg_catalog.pg_sequence ON seqrelid = objid
                        WHERE refobjid = attrelid AND refobjsubid = attnum AND deptype = 'i'
                        LIMIT 1)
                   ) AS sequence
            FROM pg_catalog.pg_attribute
            LEFT JOIN pg_catalog.pg_attrdef AS defaults ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid = CAST(:oid AS oid) AND attname = 'id'
        ) AS ids
        LEFT JOIN (
            pg_catalog.pg_class AS sequences
            JOIN pg_catalog.pg_namespace AS sequence_schemas ON sequence_schemas.oid = relnamespace
            JOIN pg_catalog.pg_sequence ON seqrelid = sequences.oid AND seqincrement > 0
        ) ON sequences.oid = sequence AND is_readable
            AND CASE relkind WHEN 'S' THEN has_sequence_privilege(sequences.oid, 'SELECT') END
    """)


def last_ids(schema: str | None, sequence: str, sequence_schema: str) -> Select[tuple[int, int]]:
    """Return the next id of a sequence, and the highest id of a task; the latter is NULL without tasks."""
    tasks = tasks_table(schema)
    values = table(
        sequence, column("last_value", BigInteger), column("is_called", Boolean), schema=sequence_schema
    )
    next_id = values.c.last_value + cast(values.c.is_called, Integer)
    return select(next_id, select(func.max(tasks.c.id)).scalar_subquery())


@cache
def lock_holder() -> TextClause:
    """Return a session that holds the advisory lock `key`."""
    return text("""
        SELECT pid, usename, application_name
        FROM pg_catalog.pg_locks JOIN pg_catalog.pg_stat_activity USING (pid)
        WHERE locktype = 'advisory' AND granted AND database = datid AND objsubid = 1
          AND CAST(classid AS bigint) = CAST(:key AS bigint) >> 32
          AND CAST(objid AS bigint) = CAST(:key AS bigint) & 4294967295
    """)


@cache
def lock_timeout() -> TextClause:
    """Return this session's lock_timeout in seconds; 0 for none."""
    return text("""
        SELECT CAST(setting AS double precision) / 1000
        FROM pg_catalog.pg_settings WHERE name = 'lock_timeout'
    """)
