"""A naming convention of a user's metadata doesn't change the names in apoq's tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.pool import NullPool

import apoq.migrations
from apoq.schema.models import Base

CONVENTION = {
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "ix_%(table_name)s_%(constraint_name)s",
    "pk": "pk_%(table_name)s",
}
NAMES = (
    "SELECT conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n'"
    " UNION SELECT indexname FROM pg_indexes WHERE schemaname = 'public'"
)


def names(engine: sa.Engine) -> set[str]:
    with engine.begin() as connection:
        return set(connection.exec_driver_sql(NAMES).scalars())


def differences(engine: sa.Engine) -> list[str]:
    with engine.begin() as connection:
        return apoq.migrations.differences(connection)


@pytest.fixture
def empty_engine(empty_url) -> Iterator[sa.Engine]:
    engine = sa.create_engine(empty_url, poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def ours(template) -> set[str]:
    return names(sa.create_engine(template, poolclass=NullPool))


def operations(connection: sa.Connection) -> Operations:
    metadata = sa.MetaData(naming_convention=CONVENTION)
    return Operations(MigrationContext.configure(connection, opts={"target_metadata": metadata}))


def test_a_revision_makes_our_names(empty_engine, ours):
    with empty_engine.begin() as connection:
        apoq.migrations.upgrade(operations(connection), version=1)

    assert names(empty_engine) == ours
    assert differences(empty_engine) == []


def test_a_copy_of_the_model_in_another_metadata_makes_our_names(empty_engine, ours):
    theirs = sa.MetaData(naming_convention=CONVENTION)
    for table in Base.metadata.sorted_tables:
        table.to_metadata(theirs)

    theirs.create_all(empty_engine)

    assert names(empty_engine) == ours - {"apoq_migrations_pkc"}


def test_names_that_a_convention_has_changed_are_no_difference(engine):
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE apoq_tasks RENAME CONSTRAINT apoq_tasks_state_check TO ck_apoq_tasks_state;"
            "ALTER TABLE apoq_tasks RENAME CONSTRAINT apoq_tasks_pkey TO pk_apoq_tasks;"
            "ALTER INDEX apoq_tasks_open_idx RENAME TO ix_open;"
            "ALTER INDEX apoq_tasks_completed_idx RENAME TO ix_completed;"
            "ALTER INDEX apoq_tasks_failed_idx RENAME TO ix_failed"
        )

    assert differences(engine) == []


@pytest.mark.parametrize(
    ("columns", "where"),
    [
        ("queue, completed_at", "indexed_state = 'failed'"),
        ("queue, completed_at", "true"),
        ("queue, failed_at", "indexed_state = 'completed'"),
    ],
)
def test_an_index_of_another_name_on_other_rows_or_columns_is_none_of_ours(engine, columns, where):
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"DROP INDEX apoq_tasks_completed_idx; CREATE INDEX i ON apoq_tasks ({columns}) WHERE {where}"
        )

    assert differences(engine) == ["the index apoq_tasks_completed_idx is missing or differs from the model"]
