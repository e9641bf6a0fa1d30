"""What apoq reads of Citus, as tables and a function of the same names in an ordinary PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa

NODE, ANOTHER = 1, 2
"""The node to which the tests connect, and another one, by their groups."""

SIZE = 616_000

_CATALOGUES = f"""
    SET allow_system_table_mods = on;
    CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass, partmethod "char", repmodel "char");
    CREATE TABLE pg_catalog.pg_dist_schema (schemaid oid, colocationid int);
    CREATE TABLE pg_catalog.pg_dist_shard (logicalrelid regclass, shardid bigint);
    CREATE TABLE pg_catalog.pg_dist_placement (shardid bigint, groupid int);
    CREATE TABLE pg_catalog.pg_dist_node (groupid int, nodename text, nodeport int, noderole text);
    CREATE TABLE pg_catalog.pg_dist_local_group (groupid int);
    CREATE FUNCTION pg_catalog.citus_total_relation_size(regclass, fail_on_error boolean DEFAULT true)
        RETURNS bigint LANGUAGE sql AS 'SELECT CAST({SIZE} AS bigint)';
    RESET allow_system_table_mods;
    INSERT INTO pg_dist_local_group VALUES ({NODE});
    INSERT INTO pg_dist_node VALUES ({NODE}, 'w1', 5432, 'primary'), ({ANOTHER}, 'w2', 5433, 'primary'),
        ({ANOTHER}, 'w3', 5434, 'secondary');
    GRANT SELECT ON ALL TABLES IN SCHEMA pg_catalog TO public
"""


def install(engine: sa.Engine) -> None:
    """Make a database look as if it had Citus, with nothing sharded."""
    with engine.begin() as connection:
        connection.connection.driver_connection.execute(_CATALOGUES)


def shard(engine: sa.Engine, schema: str, node: int = NODE) -> None:
    """Make it look as if a schema, which may have apoq's tables, had been put on a node."""
    with engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO pg_dist_schema SELECT oid, 1 FROM pg_namespace WHERE nspname = :schema"),
            {"schema": schema},
        )
        found = sa.text("SELECT to_regclass(quote_ident(:schema) || '.apoq_tasks')::text")
        if table := connection.scalar(found, {"schema": schema}):
            distribute(connection, table, node=node)


def distribute(
    connection: sa.Connection, table: str, *, method: str = "n", model: str = "s", node: int = NODE
) -> None:
    """Write what Citus does about a table that it has put on a node."""
    for statement in (
        "INSERT INTO pg_dist_partition VALUES (CAST(:table AS regclass), :method, :model)",
        "INSERT INTO pg_dist_shard VALUES (CAST(:table AS regclass), 102008)",
        "INSERT INTO pg_dist_placement VALUES (102008, :node)",
    ):
        connection.execute(
            sa.text(statement), {"table": table, "method": method, "model": model, "node": node}
        )
