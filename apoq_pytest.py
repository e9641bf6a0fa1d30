"""Fixtures for pytest, which finds them by an entry point; see `apoq.testing`.

Every pytest in the environment loads this module, also in projects that don't use apoq. So it imports only
pytest until a fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine
    from sqlalchemy.orm import Session


@pytest.fixture(scope="session")
def apoq_url() -> Iterator[URL]:
    """Return the URL of an empty database with apoq's tables, which is dropped after the tests.

    It is on the server of DATABASE_URL if that is set, or else on a private server, which needs
    ``pip install "apoq[embedded]"``.
    """
    from apoq.testing.databases import private_database

    with private_database() as url:
        yield url


@pytest.fixture(scope="session")
def apoq_engine(apoq_url: URL) -> Iterator[Engine]:
    """Return an engine of that database. To use your own engine, define a fixture with this name."""
    from sqlalchemy import create_engine

    engine = create_engine(apoq_url)
    yield engine
    engine.dispose()


@pytest.fixture
def apoq_session(apoq_engine: Engine) -> Iterator[Session]:
    """Return a session whose changes are rolled back after the test, even if they were committed."""
    from apoq.testing import rolled_back

    with rolled_back(apoq_engine) as session:
        yield session
