"""Reads database URLs, and checks that apoq can work on a database."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from psycopg.pq import Conninfo
from sqlalchemy import Dialect, Engine
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.errors import InvalidURL, UnsupportedDatabase

_SPELLINGS = {"postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async"}
_DRIVERS = {"psycopg", "psycopg_async"}


_URL = re.compile(
    r"(?P<scheme>[\w+]+)://(?P<user>(?:[^:/]*(?::[^@]*)?@)?)(?P<hosts>[^/?]*)(?P<rest>.*)", re.DOTALL
)
_HOST = re.compile(r"(?P<name>\[[^\]]+\]|[^:\[\]]*)(?::(?P<port>\d*))?")

UNREADABLE = (
    "the database's URL can't be read: it must have the form postgresql://user:password@host:5432/name, or "
    "…@host1:5432,host2:5432/name; percent-encode special characters in a password, such as %40 for @ or "
    "%2F for /"
)
# The message doesn't say which part is wrong, because it may be a part of the password.

_ADVICE = {
    "pgbouncer": "apoq detects a pooler by itself",
    "schema": "pass the schema of apoq's tables to Queue(schema=…), or use --schema on the command line",
    "ssl": "use libpq's sslmode=require",
}
"""Advice for some options of other clients."""


def database_url(url: str | URL) -> URL:
    """Return a PostgreSQL URL in any of the usual spellings as a URL for ``sqlalchemy.create_engine``.

    ``postgres://``, ``postgresql://`` and ``postgresql+psycopg://`` all select psycopg 3,
    regardless of SQLAlchemy's default driver. The URL may have several hosts, as in libpq:
    ``postgresql://host1:5432,host2:5432/name?target_session_attrs=read-write``.

    Args:
        url: The URL as a string or as a `sqlalchemy.URL`.

    Raises:
        UnsupportedDatabase: The URL names another database or another driver.
        InvalidURL: The URL can't be read, or has options that libpq doesn't know. No error message contains a
            part of the password.
    """
    if isinstance(url, str):
        parsed = _read(url.strip())
    elif isinstance(url, URL):
        _check_scheme(url.drivername)
        parsed = url
    else:
        raise TypeError(f"a database's URL must be a str or a sqlalchemy.URL, got {type(url).__qualname__}")
    for name in parsed.normalized_query.get("dbname", ()):  # as in libpq, the option has precedence
        parsed = parsed.set(database=name).difference_update_query(["dbname"])
    _check_host(parsed)
    _check_options(parsed)
    return on_psycopg(parsed)


def on_psycopg(url: URL) -> URL:
    """Return an engine's URL for psycopg 3, sync or asyncio."""
    return url.set(drivername="postgresql+psycopg")


def without_password(message: str) -> str:
    """Return an error's message without the text before an @ in a host.

    If a password has an @ that isn't encoded as %40, the host begins with the rest of the password.
    """
    return re.sub(r"(host(?: name)?:? ['\"])[^'\"]*@", r"\1", message)


def _read(text: str) -> URL:
    found = _URL.fullmatch(text)
    if found is None:
        raise InvalidURL(UNREADABLE)
    _check_scheme(found["scheme"])
    hosts = [_HOST.fullmatch(host) for host in found["hosts"].split(",")]
    if "@" in found["hosts"] + found["rest"] or None in hosts:
        raise InvalidURL(UNREADABLE)
    names = [unquote(host["name"].strip("[]")) for host in hosts if host]
    ports = [host["port"] or "" for host in hosts if host]
    # Without the hosts, because SQLAlchemy reads only one.
    url = make_url(f"{found['scheme']}://{found['user']}{found['rest']}")
    host, port = ",".join(names), ",".join(ports)
    if "/" not in host and (len(hosts) == 1 or not any(ports)):
        return url.set(host=host or None, port=int(ports[0]) if ports[0] else None)
    if "host" in url.query:
        return url  # as in libpq, the option has precedence
    if any(ports) and "port" not in url.query:
        url = url.update_query_dict({"port": port})
    return url.update_query_dict({"host": host})


def _check_scheme(name: str) -> None:
    if name not in _SPELLINGS:
        raise UnsupportedDatabase(
            f"the database must be PostgreSQL through psycopg 3, got {name!r}: "
            "use a URL that starts with postgresql://"
        )


def _check_host(url: URL) -> None:
    if "@" in (url.host or ""):
        raise InvalidURL(UNREADABLE)


def _check_options(url: URL) -> None:
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    unknown = [name for name in url.query if name not in known]
    if unknown and "plugin" not in url.query:  # one of SQLAlchemy's plugins may know them
        if "@" in str(dict(url.query)):
            raise InvalidURL(UNREADABLE)
        advice = "".join(f"; {_ADVICE[name]}" for name in unknown if name in _ADVICE)
        raise InvalidURL(
            "the database's URL must have no other options than libpq's, got "
            f"{', '.join(map(repr, unknown))}: remove options that libpq doesn't know{advice}"
        )
    try:
        PGDialect_psycopg().create_connect_args(url)  # type: ignore[no-untyped-call]
        is_read = True
    except (ArgumentError, ValueError):
        is_read = False
    if not is_read:
        raise InvalidURL(UNREADABLE)


def check_dialect(dialect: Dialect) -> None:
    """Raise `UnsupportedDatabase` unless an engine or a session is on PostgreSQL, through psycopg 3."""
    if dialect.name != "postgresql" or dialect.driver not in _DRIVERS:
        raise UnsupportedDatabase(
            f"the database must be PostgreSQL through psycopg 3, got {dialect.name}+{dialect.driver}: "
            "create the engine with a postgresql+psycopg:// URL"
        )


def check_engine(engine: Engine | AsyncEngine) -> None:
    """Raise `UnsupportedDatabase` or `InvalidURL` if apoq can't work on an engine."""
    check_dialect(engine.dialect)
    _check_host(engine.url)


def check_untranslated(options: Mapping[str, Any], schema: str | None) -> None:
    """Raise `UnsupportedDatabase` if execution options map the schema of apoq's tables to another.

    SQLAlchemy translates only its own statements: workers, COPY and notifications would not find the tables.
    """
    translated = options.get("schema_translate_map") or {}
    other = translated.get(schema, schema)
    if other != schema:
        raise UnsupportedDatabase(
            f"schema_translate_map must not map the schema of apoq's tables, but it maps {schema!r} to "
            f"{other!r}: use Queue(schema={other!r}) and prepare(engine, schema={other!r}) instead"
        )


def sync_side(engine: Engine | AsyncEngine) -> Engine:
    """Return the engine itself, or an asyncio engine's inner engine, which has its pool and its events."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine
