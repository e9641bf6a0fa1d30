"""Runs apoq's migrations on the database from the command line, the environment or alembic.ini."""

import os

from alembic import context
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from apoq.migrations import VERSION_TABLE, adopt, current, lock
from apoq.migrations.places import warn_of_another_set
from apoq.postgres.urls import database_url
from apoq.schema.models import Base


def url():
    found = (
        context.get_x_argument(as_dictionary=True).get("url")
        or os.environ.get("APOQ_DATABASE_URL")
        or os.environ.get("DATABASE_URL")
        or context.config.get_main_option("sqlalchemy.url")
    )
    if not found:
        message = "no database URL: set DATABASE_URL, or run `alembic -x url=postgresql://… upgrade head`"
        raise SystemExit(message)
    return database_url(found)


def include_name(name, type_, _parents):
    # Other tables in the same database don't belong to apoq.
    return type_ != "table" or name in Base.metadata.tables


def configure(**options) -> None:
    context.configure(
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        include_name=include_name,
        compare_server_default=True,
        **options,
    )


def run(connection: Connection) -> None:
    configure(connection=connection)
    with context.begin_transaction():
        lock(connection)
        warn_of_another_set(connection)
        adopted = adopt(connection)
        context.run_migrations()
        if adopted and not current(connection):
            # Commands such as `alembic current` only read, so the Node.js original keeps its version table.
            connection.get_transaction().rollback()


if context.is_offline_mode():
    configure(dialect_name="postgresql", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
elif (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    # READ COMMITTED, so that after waiting for the lock this sees the changes of other migrations.
    engine = create_engine(url(), poolclass=NullPool, isolation_level="READ COMMITTED")
    with engine.connect() as connection:
        run(connection)
