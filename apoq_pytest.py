"""Fixtures for pytest, which finds them by itself; see `apoq.testing`.

Every pytest in the environment loads this module, whether its project uses apoq or not. So it imports nothing
but pytest, until a fixture is asked for.
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
    """Answer the URL of an empty database with apoq's tables, which is dropped after the tests.

    On the server of DATABASE_URL, where that is set; else on a private one: ``pip install "apoq[embedded]"``.
    """
    from apoq.testing.databases import private_database

    with private_database() as url:
        yield url


@pytest.fixture(scope="session")
def apoq_engine(apoq_url: URL) -> Iterator[Engine]:
    """Answer an engine on that database; or define a fixture of this name, with an engine of yours."""
    from sqlalchemy import create_engine

    engine = create_engine(apoq_url)
    yield engine
    engine.dispose()


@pytest.fixture
def apoq_session(apoq_engine: Engine) -> Iterator[Session]:
    """Give a session whose transaction is rolled back after the test, even where it commits."""
    from apoq.testing import rolled_back

    with rolled_back(apoq_engine) as session:
        yield session
