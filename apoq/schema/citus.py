"""Recognizes whether Citus shards apoq's tables, and on which node they are.

Citus puts a schema that it shards on one node of a cluster. Its tables can be used through every node.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection

from apoq.schema.statements import citus as statements


class Placement(NamedTuple):
    """Where Citus has put the task table of a schema."""

    method: str
    is_copied: bool
    host: str | None
    port: int | None
    is_here: bool
    """Whether this connection leads to the node that has the table."""

    @property
    def is_whole(self) -> bool:
        """Whether the table is in one piece, and there is only one of it."""
        return self.method == "n" and not self.is_copied

    @property
    def node(self) -> str:
        """The node as an operator knows it."""
        return f"{self.host}:{self.port}"


def placement(connection: Connection, schema: str | None = None) -> Placement | None:
    """Return where the task table of a schema is; None without Citus, or if Citus doesn't distribute it."""
    if not connection.execute(statements.has_citus()).mappings().one()["has_citus"]:
        return None
    row = connection.execute(statements.placement(), {"schema": schema}).first()
    return None if row is None else Placement(*row)


def shards(connection: Connection, schema: str | None = None) -> bool:
    """Return whether Citus shards a schema, so that new tables in it will be on one node of the cluster."""
    if not connection.execute(statements.has_citus()).mappings().one()["has_schemas"]:
        return False
    return bool(connection.scalar(statements.shards(), {"schema": schema}))
