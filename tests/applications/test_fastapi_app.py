"""The FastAPI example."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from applications.harness import Example, Scenario, Site, free_port, until

pytestmark = pytest.mark.slow

WEB = ["uvicorn", "app:app", "--port", "{port}", "--workers", "2"]

EXAMPLE = Example(
    folder="fastapi_app",
    extras="binary,embedded,fastapi",
    migrate=["alembic", "upgrade", "head"],
    web=WEB,
    worker=["apoq", "worker", "app:worker"],
)


class TestTheFastAPIApplication(Scenario):
    def test_its_history_and_its_models_agree(self, application, variables):
        assert "No new upgrade operations" in application.run(["alembic", "check"], **variables)

    def test_a_web_server_of_several_processes_works_tasks_itself(self, application, variables, mailbox):
        port = free_port()
        command = [part.format(port=port) for part in WEB]
        web = application.start(command, **variables, IN_PROCESS_WORKER=1)

        with ExitStack() as stack:
            stack.callback(web.end)
            site = Site(port, stack)
            until(site.responds, what="the site responds", alive=web)
            addresses = [f"embedded{n}@example.org" for n in range(5)]
            for address in addresses:
                site.sign_up(address)
            until(lambda: "embedded4@example.org" in site.page(), what="the last mail", alive=web)
            until(lambda: all(map(mailbox.of, addresses)), what="all mails", alive=web)

        assert [len(mailbox.of(address)) for address in addresses] == [1] * 5
        assert "Traceback" not in web.output()
