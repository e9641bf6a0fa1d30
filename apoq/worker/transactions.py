"""The worker's own transactions: short, and ended by the server where the worker can't."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, Engine, event

BEGIN: Final = """
    BEGIN ISOLATION LEVEL READ COMMITTED;
    SET LOCAL idle_in_transaction_session_timeout = '5s';
    SET LOCAL statement_timeout = '60s'
"""
# READ COMMITTED, for at a higher level claims would fail on each other (40001).
# The first timeout, for a worker that is frozen in a transaction would keep its rows locked, and nobody could
# rescue them. LOCAL, for with a pooler the session is the next one's, too.


def short_transactions(engine: Engine) -> Engine:
    """Let an engine whose connections are at AUTOCOMMIT begin transactions in this way, in one round trip."""

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(BEGIN)

    return engine
