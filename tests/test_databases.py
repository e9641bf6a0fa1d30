"""Which databases apoq works on, and the engines that it makes of its own."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from apoq import UnsupportedDatabase, database_url


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
