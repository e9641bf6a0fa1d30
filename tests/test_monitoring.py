"""docs/monitoring.md: its code reports, logs and counts what the page says."""

from __future__ import annotations

import logging

import pytest
import sentry_sdk
from pages import DOCS, blocks
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport
from sqlalchemy.orm import Session

PAGE = DOCS / "monitoring.md"


class Kept(Transport):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_event()
        if event is not None:
            self.events.append(event)


@pytest.fixture
def page(run_page, engine, session, queue, worker):
    """Run the page; return its names, and the worker of its examples on Sentry."""
    return run_page("monitoring.md", engine=engine, session=session, queue=queue, worker=worker)


def test_the_metrics_are_those_of_the_worker_and_of_the_database(page):
    assert b'apoq_tasks_total{outcome="completed",queue="default",type="send_welcome"} 0.0' in page["body"]
    content_type, body = page["metrics_page"]("")
    assert (content_type.startswith("text/plain"), b"apoq_database_up 1.0" in body) == (True, True)


def test_a_final_failure_is_reported_once_without_the_data(page, engine, queue, make_worker):
    transport = Kept()
    sentry_sdk.init(dsn="http://key@127.0.0.1:1/1", transport=transport, default_integrations=False)
    worker = make_worker()

    def process(task):
        raise ValueError("no")

    worker.use("t", process, retry_delay=0)
    worker.events.on(page["TaskFailed"], page["report_failure"])
    with Session(engine) as adding, adding.begin():
        task_id = queue.add(adding, "t", {"secret": 1}, retry_limit=1).id

    worker.work()
    worker.work()
    sentry_sdk.init()

    (event,) = transport.events
    assert event["exception"]["values"][-1]["type"] == "ValueError"
    assert event["tags"] == {"apoq.queue": "default", "apoq.type": "t"}
    assert event["contexts"]["task"]["id"] == task_id
    assert event["fingerprint"] == ["{{ default }}", "t"]


def test_each_line_of_a_processor_has_its_task(page, engine, queue, make_worker, caplog):
    caplog.set_level(logging.INFO)
    log = logging.getLogger("myapp")
    worker = make_worker(middleware=page["remember"])
    worker.use("t", lambda task: log.info("working"))
    with Session(engine) as adding, adding.begin():
        task_id = queue.add(adding, "t", meta={"request_id": "9f"}).id

    worker.work()
    log.info("outside")
    log.filters.clear()

    inside, outside = (record for record in caplog.records if record.name == "myapp")
    assert (inside.task_id, inside.task_type, inside.request_id) == (task_id, "t", "9f")
    assert not hasattr(outside, "task_id")


def test_its_alerts_are_those_of_the_examples():
    (shown,) = (block.code for block in blocks(PAGE, "yaml"))
    rules = (DOCS.parent / "examples" / "monitoring" / "alerts.yml").read_text()

    for line in shown.splitlines():
        assert line.strip() in rules
