"""The FastAPI example."""

from __future__ import annotations

from contextlib import ExitStack

from applications.harness import Example, Scenario, Site, free_port, until

WEB = ["uvicorn", "app:app", "--port", "{port}", "--workers", "2"]

EXAMPLE = Example(
    folder="fastapi_app",
    extras="binary,embedded,fastapi",
    migrate=["alembic", "upgrade", "head"],
    web=WEB,
    worker=["apoq", "worker", "app:worker"],
    environment={"EMBEDDED_WORKER": "0"},
)


class TestTheFastAPIApplication(Scenario):
    def test_its_history_and_its_models_agree(self, application, variables):
        assert "No new upgrade operations" in application.run(["alembic", "check"], **variables)
