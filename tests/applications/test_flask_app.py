"""The Flask example."""

from __future__ import annotations

import pytest
from applications.harness import Example, Scenario

pytestmark = pytest.mark.slow

EXAMPLE = Example(
    folder="flask_app",
    extras="binary,embedded,flask",
    migrate=["flask", "db", "upgrade"],
    web=["gunicorn", "--bind", "127.0.0.1:{port}", "--workers", "2", "app:create_app()"],
    worker=["flask", "apoq", "worker"],
)


class TestTheFlaskApplication(Scenario):
    def test_its_history_and_its_models_agree(self, application, variables):
        assert "No new upgrade operations" in application.run(["flask", "db", "check"], **variables)
