"""The Pyramid example."""

from __future__ import annotations

import pytest
from applications.harness import Example, Scenario

pytestmark = pytest.mark.slow

EXAMPLE = Example(
    folder="pyramid_app",
    extras="binary,embedded,pyramid",
    migrate=["alembic", "-c", "development.ini", "upgrade", "head"],
    web=["pserve", "development.ini", "http_port={port}"],
    worker=["apoq", "worker", "--pyramid", "development.ini"],
    environment={"PYTHONPATH": "."},
)


class TestThePyramidApplication(Scenario):
    def test_its_history_and_its_models_agree(self, application, variables):
        check = ["alembic", "-c", "development.ini", "check"]

        assert "No new upgrade operations" in application.run(check, **variables)
