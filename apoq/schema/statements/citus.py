"""Reads the catalogues of Citus, which spreads schemas over the nodes of a cluster."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Text, TextClause, bindparam, text


@cache
def has_citus() -> TextClause:
    """Return whether the database has Citus, and whether that is new enough to shard schemas.

    The other statements of this module need its catalogues: `shards` those of Citus 12.
    """
    return text("""
        SELECT to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL AS has_citus,
               to_regclass('pg_catalog.pg_dist_schema') IS NOT NULL AS has_schemas
    """)


@cache
def placement() -> TextClause:
    """Return how Citus has distributed the task table of `schema`, and where; no row if it hasn't.

    `method` is 'n' for a table of one shard or a copy on each node (`is_copied`). `host` and `port` are those
    of the node that has the table, and `is_here` says whether this session is on that node.
    """
    return text("""
        SELECT CAST(partmethod AS text) AS method, CAST(repmodel AS text) = 't' AS is_copied,
               nodename AS host, nodeport AS port,
               coalesce(
                   pg_dist_placement.groupid = (SELECT groupid FROM pg_catalog.pg_dist_local_group), false
               ) AS is_here
        FROM pg_catalog.pg_dist_partition
        LEFT JOIN pg_catalog.pg_dist_shard USING (logicalrelid)
        LEFT JOIN pg_catalog.pg_dist_placement USING (shardid)
        LEFT JOIN pg_catalog.pg_dist_node
            ON pg_dist_node.groupid = pg_dist_placement.groupid AND CAST(noderole AS text) = 'primary'
        WHERE logicalrelid = to_regclass(concat_ws('.', quote_ident(:schema), 'apoq_tasks'))
        ORDER BY is_here DESC LIMIT 1
    """).bindparams(bindparam("schema", type_=Text))


@cache
def shards() -> TextClause:
    """Return whether Citus shards the schema `schema`, or, if that is NULL, the first of the search_path."""
    return text("""
        SELECT EXISTS (
            SELECT FROM pg_catalog.pg_dist_schema
            WHERE CAST(schemaid AS oid) = (
                SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = coalesce(:schema, current_schema())
            )
        )
    """).bindparams(bindparam("schema", type_=Text))


@cache
def size() -> TextClause:
    """Return the size of the task table of `schema` on its node, in bytes."""
    return text("""
        SELECT citus_total_relation_size(to_regclass(concat_ws('.', quote_ident(:schema), 'apoq_tasks')))
    """).bindparams(bindparam("schema", type_=Text))
