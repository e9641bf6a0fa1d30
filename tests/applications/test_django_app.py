"""The Django example."""

from __future__ import annotations

import pytest
from applications.harness import Example, Scenario

pytestmark = pytest.mark.slow

EXAMPLE = Example(
    folder="django_app",
    extras="binary,embedded",
    migrate=["python", "manage.py", "migrate"],
    web=["gunicorn", "--bind", "127.0.0.1:{port}", "--workers", "2", "mysite.wsgi"],
    worker=["apoq", "worker", "mysite.worker:worker"],
)


class TestTheDjangoProject(Scenario):
    def test_its_history_and_its_models_agree(self, application, variables):
        application.run(["python", "manage.py", "makemigrations", "--check", "--dry-run"], **variables)

    def test_its_own_tests_pass(self, application, variables):
        assert "Ran 3 tests" in application.run(["python", "manage.py", "test"], **variables)

    def test_its_migrations_go_back_and_forth(self, application, variables):
        for where in ("0001", "0002"):
            application.run(["python", "manage.py", "migrate", "signup", where], **variables)
