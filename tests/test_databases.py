"""Which databases apoq works on, and the engines that it makes of its own."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from apoq import UnsupportedDatabase, database_url
from apoq.databases import own_engine


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async"]
)
def test_every_usual_spelling_means_psycopg_3(scheme):
    url = database_url(f"{scheme}://me:secret@host:5433/app?sslmode=require")

    assert (
        url.render_as_string(hide_password=False)
        == "postgresql+psycopg://me:secret@host:5433/app?sslmode=require"
    )


@pytest.mark.parametrize("url", ["sqlite://", "postgresql+asyncpg://host/app", "mysql://host/app"])
def test_another_database_or_driver_is_refused(url):
    with pytest.raises(UnsupportedDatabase, match="postgresql://"):
        database_url(url)


def test_a_url_of_any_spelling_connects(server):
    url = server.set(drivername="postgres") if server.drivername != "postgres" else server
    engine = sa.create_engine(database_url(url.render_as_string(hide_password=False)))

    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    engine.dispose()


def test_its_own_engine_needs_nothing_of_the_callers_pool(url):
    engine = sa.create_engine(url, pool_size=1, max_overflow=0, pool_timeout=1)
    own = own_engine(engine)

    with engine.connect(), own.connect() as first, own.connect() as second:
        pids = {connection.scalar(sa.text("SELECT pg_backend_pid()")) for connection in (first, second)}

    assert len(pids) == 2
    own.dispose()
    engine.dispose()


def test_its_own_engine_prepares_no_named_statements(url):
    """They don't survive a pooler in transaction mode."""
    own = own_engine(sa.create_engine(url, poolclass=sa.NullPool))

    with own.connect() as connection:
        for _ in range(20):
            connection.execute(sa.text("SELECT :n + 1"), {"n": 1})
        prepared = connection.scalar(sa.text("SELECT count(*) FROM pg_prepared_statements"))

    assert prepared == 0
    own.dispose()


def test_its_own_engine_connects_as_the_callers_does(url):
    """With the same arguments and events, as where a token is fetched for each connection."""
    engine = sa.create_engine(url, connect_args={"application_name": "mine"})
    connected = []

    @sa.event.listens_for(engine, "do_connect")
    def connect(_dialect, _record, _arguments, parameters) -> None:
        connected.append(parameters["application_name"])

    own = own_engine(engine)
    with own.connect() as connection:
        name = connection.scalar(sa.text("SHOW application_name"))

    assert (name, connected) == ("mine", ["mine"])
    own.dispose()
    engine.dispose()


def test_an_asyncio_engine_has_a_twin_for_threads(url):
    own = own_engine(create_async_engine(url).sync_engine)

    with own.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    own.dispose()
