"""Checks of the server and of the connection to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final
from uuid import uuid4

import sqlalchemy as sa
from psycopg import sql

from apoq.monitor.check import BAD, OK, WARNING, Finding
from apoq.monitor.formatting import length
from apoq.postgres.connections import execute, keeps_session, own_engine
from apoq.schema.statements.notify import CHANNEL, Notification, arrays, notify
from apoq.schema.statements.server import clock, connections, server

OLDEST_SERVER_VERSION: Final = 150_000
"""PostgreSQL 15, as `server_version_num` writes it."""

STRANGERS: Final = {
    "CockroachDB": "CockroachDB",
    "Aurora DSQL": "Aurora DSQL",
    ".dsql.": "Aurora DSQL",
    "-YB-": "YugabyteDB",
    "Redshift": "Amazon Redshift",
    "Greenplum": "Greenplum",
    "CrateDB": "CrateDB",
    "Materialize": "Materialize",
    "openGauss": "openGauss",
    "RisingWave": "RisingWave",
}
"""Servers with PostgreSQL's protocol that lack what a queue needs, by their version() or host name."""

NOTIFY_TIMEOUT_SECONDS: Final = 3.0
"""Seconds within which a notification must have arrived."""

MAX_CLOCK_SKEW_SECONDS: Final = 1.0
"""Seconds by which two clocks may differ."""

SHORT_TIMEOUT_SECONDS: Final = 60.0
"""Seconds: a shorter timeout interrupts processors."""

CROWDED, FULL = 0.8, 0.95
"""The share of the server's connections that are in use."""


def check_server(connection: sa.Connection) -> Iterator[Finding]:
    """Check what the server is, and whether apoq works with it."""
    found = connection.execute(server()).mappings().one()
    yield _flavour(found, connection.engine.url.host or "")
    encoding = found["server_encoding"]
    if encoding == "UTF8":
        yield Finding(OK, "encoding", "UTF8")
    else:
        cure = "CREATE DATABASE … TEMPLATE template0 ENCODING 'UTF8', and move your data there"
        yield Finding(BAD, "encoding", f"{encoding}, which can't store every character", cure)
    yield from _timeouts(found)


def _flavour(found: sa.RowMapping, host: str) -> Finding:
    for sign, name in STRANGERS.items():
        if sign in found["version"] or sign in host:
            cure = "use PostgreSQL 15 or later; on Aurora, Aurora PostgreSQL"
            return Finding(BAD, "server", f"{name}, which apoq doesn't work with", cure)
    version = found["server_version"]
    if int(found["server_version_num"] or 0) < OLDEST_SERVER_VERSION:
        return Finding(
            BAD, "server", f"PostgreSQL {version} is too old", "upgrade it to PostgreSQL 15 or later"
        )
    return Finding(OK, "server", f"PostgreSQL {version}")


def _timeouts(found: sa.RowMapping) -> Iterator[Finding]:
    """Check for timeouts that interrupt processors; apoq's own connections have their own settings."""
    whom = {
        "statement_timeout": "statements of processors in task.session",
        "idle_in_transaction_session_timeout": "processors that pause after they have used task.session",
        "transaction_timeout": "processors that use task.session",
    }
    is_clean = True
    for name, hurt in whom.items():
        seconds = _seconds(found[name])
        if 0 < seconds < SHORT_TIMEOUT_SECONDS:
            is_clean = False
            yield Finding(
                WARNING,
                "timeouts",
                f"{name} is {length(seconds)}: it interrupts {hurt} for longer",
                f"if they need longer: ALTER ROLE … SET {name} = '10min' for the role of the workers",
            )
    if is_clean:
        yield Finding(OK, "timeouts", "none below a minute, so none interrupts processors early")


def _seconds(setting: str | None) -> float:
    """Return the seconds of a setting such as 0, 500ms, 30s or 10min."""
    units = {"ms": 0.001, "s": 1, "min": 60, "h": 3_600, "d": 86_400}
    text = setting or "0"
    unit = text.lstrip("0123456789")
    return float(text.removesuffix(unit) or 0) * units.get(unit, 0.001)


def check_clock(connection: sa.Connection) -> Iterator[Finding]:
    """Compare the server's clock with this machine's."""
    connection.execute(clock())  # so that the next one is compiled, and the connection is open
    before = time.time()
    there: float = connection.execute(clock()).scalar_one()
    here = (before + time.time()) / 2
    ahead = there - here
    if abs(ahead) < MAX_CLOCK_SKEW_SECONDS:
        yield Finding(OK, "clock", f"{abs(ahead) * 1_000:,.0f} ms difference to this machine's")
        return
    yield Finding(
        WARNING,
        "clock",
        f"the server's is {length(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} this machine's",
        "synchronize both by NTP; until then, add tasks with delay= instead of process_at=",
    )


def check_connections(connection: sa.Connection) -> Iterator[Finding]:
    """Check how many connections are left."""
    found = connection.execute(server()).mappings().one()
    most = int(found["max_connections"]) - int(found["superuser_reserved_connections"])
    taken: int = connection.execute(connections()).scalar_one()
    text = f"{taken:,} of {most:,} are in use"
    cure = "use fewer or smaller pools, or a pooler such as PgBouncer, or raise max_connections"
    if taken < CROWDED * most:
        yield Finding(OK, "connections", text)
    else:
        yield Finding(BAD if taken >= FULL * most else WARNING, "connections", text, cure)


def check_way(engine: sa.Engine) -> Iterator[Finding]:
    """Check for a pooler, and whether notifications arrive."""
    own = own_engine(engine)
    try:
        is_direct = keeps_session(own)
        if is_direct:
            yield Finding(OK, "pooler", "none")
        else:
            yield Finding(
                WARNING,
                "pooler",
                "there is one, such as PgBouncer in transaction mode; apoq works with it",
                'for your own engines: create_engine(…, connect_args={"prepare_threshold": None})',
            )
        took = _notify(own)
    finally:
        own.dispose()
    if took is not None:
        yield Finding(OK, "notifications", f"arrive within {max(1, round(took * 1_000))} ms")
        return
    yield Finding(
        WARNING,
        "notifications",
        "don't arrive: an idle worker finds new tasks only by polling, every 2 s",
        "Worker(…, listen_url=…) with a URL of the server itself, without the pooler",
    )


def _notify(own: sa.Engine) -> float | None:
    """Send a notification as a worker does, on a new channel; return the seconds until it arrived."""
    channel = f"{CHANNEL}_{uuid4().hex}"
    name = sql.Identifier(channel)
    pooled = own.raw_connection()
    connection: Any = pooled.driver_connection
    pooled.detach()
    try:
        connection.execute(sql.SQL("LISTEN {}").format(name))
        took = None
        for _ in range(2):  # the first one opens the connection on which it is sent
            began = time.monotonic()
            execute(own, notify(), arrays([Notification(channel, "")]))
            if not list(connection.notifies(timeout=NOTIFY_TIMEOUT_SECONDS, stop_after=1)):
                return None
            took = time.monotonic() - began
        return took
    finally:
        # Behind a pooler, other clients use this session from now on.
        connection.execute(sql.SQL("UNLISTEN {}").format(name))
        connection.close()
