"""docs/recipes.md: each recipe does what it promises."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pages
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.orm import Session
from waiting import patience

from apoq import InvalidData, Queue, Task, Worker
from apoq.cli import main
from apoq.events import TaskStarted

PAGE = pages.DOCS / "recipes.md"

until = patience(15)

Recipe = Callable[..., Any]
"""Run the common module and the code of a recipe; return the module."""


def sections() -> dict[str, list[pages.Block]]:
    """Return the page's blocks by the headings above them; those before the first heading by ""."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    headings = [(0, "")] + [(number, line[3:]) for number, line in enumerate(lines, 1) if line[:3] == "## "]
    found: dict[str, list[pages.Block]] = {heading: [] for _, heading in headings}
    for block in pages.blocks(PAGE):
        found[max(pair for pair in headings if pair[0] < block.line)[1]].append(block)
    return found


def code_of(heading: str, language: str = "python") -> list[str]:
    """Return the code of a recipe, with the numbers of its lines on the page."""
    return [
        "\n" * (block.line - 1) + block.code for block in sections()[heading] if block.language == language
    ]


@pytest.fixture
def recipe(url, monkeypatch) -> Iterator[Recipe]:
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    made: list[Any] = []

    def run(heading: str, *, blocks: slice = slice(None), queue: Queue | None = None) -> Any:
        module: Any = ModuleType(f"recipe_{len(made)}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        made.append(module)
        _execute(module, code_of(""))
        module.queue = queue or module.queue
        _execute(module, code_of(heading)[blocks])
        module.Base.metadata.create_all(module.engine)
        return module

    yield run
    for module in made:
        for value in vars(module).values():
            if isinstance(value, Worker):
                value.stop(timeout=5)
        module.engine.dispose()


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., str]]:
    """Serve HTTP on this machine: each request gets the next response; return the URL."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[ThreadingHTTPServer] = []

    def start(answers: list[tuple[int, dict[str, str], bytes]], requests: list[Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                requests.append((self.headers, body))
                status, headers, content = answers.pop(0)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815 - http.server's name

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    # An HTTPError that is not closed keeps its connection until then.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def _execute(module: ModuleType, codes: list[str]) -> None:
    for code in codes:
        exec(compile(code, str(PAGE), "exec", dont_inherit=True), vars(module))


def work_all(worker: Worker) -> None:
    while worker.work() is not None:
        pass


def tasks(page: Any, type: str | None = None, state: str | None = None) -> list[Task]:
    found = sa.select(Task).order_by(Task.id)
    if type is not None:
        found = found.where(Task.type == type)
    if state is not None:
        found = found.where(Task.state == state)
    with Session(page.engine) as session:
        return list(session.scalars(found))


def make_due(page: Any) -> None:
    """Let the time pass after which pending tasks are due."""
    with page.engine.begin() as connection:
        connection.execute(sa.update(Task).where(Task.state == "pending").values(process_at=sa.func.now()))


def seconds_until_due(page: Any, task_id: int) -> float:
    until_due = sa.select(sa.extract("epoch", Task.process_at - sa.func.now())).where(Task.id == task_id)
    with page.engine.connect() as connection:
        return float(connection.scalar(until_due))


def test_each_recipe_has_a_test():
    headings = {heading for heading in sections() if heading}

    assert headings == set(re.findall(r'\brecipe\("([^"]+)"', Path(__file__).read_text(encoding="utf-8")))


def test_each_recipe_is_in_the_table_at_the_top():
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in sections() if heading
    }
    table = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]

    assert set(re.findall(r"\(#([\w-]+)\)", table)) == anchors


def test_the_next_task_is_added_if_and_only_if_this_one_completes(recipe):
    page = recipe("Run one task after another")
    keys: list[str] = []

    def charge(_order_id: int, *, key: str) -> None:
        keys.append(key)
        if len(keys) == 1:
            raise ConnectionError

    page.charge = charge
    with Session(page.engine) as session, session.begin():
        task_id = page.charge_card.add(session, 7).id

    page.worker.work()
    assert tasks(page, "ship_order") == []
    make_due(page)
    work_all(page.worker)

    assert keys == [f"charge-{task_id}"] * 2
    assert [(task.state, task.data) for task in tasks(page, "ship_order")] == [("completed", {"order_id": 7})]


def test_a_checkpoint_is_visible_and_a_retry_goes_on_from_there(recipe):
    page = recipe("Continue a long task where it failed")
    pages_done, seen = [], []

    def export_page(_session: Session, number: int) -> None:
        with Session(page.engine) as other:
            seen.append(other.get_one(page.Export, 1).done)
        pages_done.append(number)
        if pages_done == [0, 1, 2]:
            raise ConnectionError

    page.export_page = export_page
    with Session(page.engine) as session, session.begin():
        session.add(page.Export(id=1, pages=4))
        page.export_pages.add(session, 1)

    assert page.worker.work().state == "pending"
    make_due(page)
    assert page.worker.work().state == "completed"

    assert pages_done == [0, 1, 2, 2, 3]
    assert seen == pages_done


def test_a_long_loop_stops_and_another_worker_goes_on(recipe):
    page = recipe("Stop a long loop gracefully")
    indexed: list[int] = []
    page.index_document = indexed.append
    with Session(page.engine) as session, session.begin():
        session.add(page.Index(id=1))
        page.reindex.add(session, 1, documents=10**9)

    page.worker.start()
    until(lambda: len(indexed) > 10)
    page.worker.stop(timeout=20)

    (task,) = tasks(page)
    assert (task.state, task.attempt, task.fail_count) == ("pending", 0, 0)
    reached = len(indexed)
    with page.engine.begin() as connection:
        connection.execute(sa.update(Task).values(data={"index_id": 1, "documents": reached + 5}))
    assert page.Worker(page.engine, page.queue).work().state == "completed"
    assert indexed == list(range(1, reached + 6))


class TestFanOut:
    @pytest.fixture
    def page(self, recipe) -> Any:
        page = recipe("Fan-out and a last step")
        with Session(page.engine) as session, session.begin():
            session.add(page.Import(id=1, rows=1_000))
            page.import_file.add(session, 1)
        return page

    def test_the_last_step_is_added_once_after_all_chunks(self, page):
        def import_rows(session: Session, first: int) -> None:
            session.execute(sa.text("INSERT INTO ledger VALUES (:first)"), {"first": first})

        page.import_rows = import_rows

        page.worker.start()

        until(lambda: tasks(page, "import_done", "completed"))
        page.worker.stop()
        chunks, (done,) = tasks(page, "import_chunk"), tasks(page, "import_done")
        assert [chunk.state for chunk in chunks] == ["completed"] * 10
        assert done.claimed_at > max(chunk.completed_at for chunk in chunks)
        with page.engine.connect() as connection:
            firsts = connection.scalars(sa.text("SELECT task_id FROM ledger ORDER BY task_id")).all()
        assert firsts == list(range(0, 1_000, 100))

    def test_without_rows_there_is_only_the_last_step(self, page):
        with page.engine.begin() as connection:
            connection.execute(sa.update(page.Import).values(rows=0))

        work_all(page.worker)

        assert [task.type for task in tasks(page, state="completed")] == ["import_file", "import_done"]

    def test_it_waits_for_a_chunk_that_failed_for_good(self, page):
        broken = {300}

        def import_rows(_session: Session, first: int) -> None:
            if first in broken:
                raise ConnectionError

        page.import_rows = import_rows
        while tasks(page, state="pending"):
            work_all(page.worker)
            make_due(page)

        (failed,) = tasks(page, state="failed")
        assert tasks(page, "import_done") == []

        broken.clear()
        with Session(page.engine) as session, session.begin():
            page.queue.retry(session, failed.id)
        work_all(page.worker)
        assert len(tasks(page, "import_done", "completed")) == 1


def test_metrics_have_what_happened(recipe):
    page = recipe("Count and time tasks")
    observed: list[tuple[str, str]] = []
    counted: list[tuple[str, str]] = []

    def observe(name: str, seconds: float, type: str) -> None:
        assert 0 <= seconds < 60
        observed.append((name, type))

    def fail(_task: Any) -> None:
        raise ConnectionError

    page.observe = observe
    page.increment = lambda *names: counted.append(names)
    page.worker.use("ok", lambda task: None)
    page.worker.use("broken", fail, retry_limit=1, retry_delay=lambda fail_count: 0)
    with Session(page.engine) as session, session.begin():
        page.queue.add(session, "ok")
        page.queue.add(session, "broken")

    work_all(page.worker)

    assert Counter(observed) == {
        ("task_lag_seconds", "ok"): 1,
        ("task_seconds", "ok"): 1,
        ("task_lag_seconds", "broken"): 2,
    }
    assert counted == [("tasks_retried", "broken"), ("tasks_failed", "broken")]


def test_a_final_failure_is_logged_as_an_error_with_its_exception(recipe, caplog):
    page = recipe("Count and time tasks")
    error = ConnectionError("the bank is away")

    def fail(_task: Any) -> None:
        raise error

    page.worker.use("broken", fail, retry_limit=0)
    with Session(page.engine) as session, session.begin():
        page.queue.add(session, "broken")

    page.worker.work()

    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info[1] is error


def test_a_mail_is_sent_if_and_only_if_the_transaction_commits(recipe):
    page = recipe("Send an e-mail when a transaction commits")
    sent: list[dict[str, str]] = []

    def send_mail(**mail: str) -> None:
        sent.append(mail)
        if len(sent) == 1:
            raise OSError("the mail server is away")

    page.send_mail = send_mail
    with Session(page.engine) as session:
        page.sign_up(session, "rolled@example.com")
        session.rollback()
    with Session(page.engine) as session, session.begin():
        user_id = page.sign_up(session, "ann@example.com").id

    work_all(page.worker)
    make_due(page)
    work_all(page.worker)

    assert [mail["to"] for mail in sent] == ["ann@example.com", "ann@example.com"]  # the first one failed
    assert {mail["message_id"] for mail in sent} == {f"<welcome-{user_id}@example.com>"}
    assert [task.state for task in tasks(page)] == ["completed"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_webhook_gets_the_same_key_in_each_attempt(recipe, serve):
    page = recipe("Call a webhook with an idempotency key")
    requests: list[Any] = []
    address = serve([(500, {}, b""), (200, {}, b"")], requests)
    with Session(page.engine) as session, session.begin():
        task_id = page.call_webhook.add(session, address, {"order": 7}).id

    assert page.worker.work().state == "pending"
    make_due(page)
    assert page.worker.work().state == "completed"

    assert [headers["Idempotency-Key"] for headers, _ in requests] == [f"shop-{task_id}"] * 2
    assert [json.loads(body) for _, body in requests] == [{"order": 7}] * 2


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("headers", "seconds"), [({"Retry-After": "120"}, 120), ({}, 60)])
def test_after_a_429_a_task_waits_as_long_as_it_is_told(recipe, serve, headers, seconds):
    page = recipe("Wait after an HTTP 429")
    stored: list[bytes] = []
    page.store = stored.append
    address = serve([(429, headers, b""), (200, {}, b"here")], [])
    with Session(page.engine) as session, session.begin():
        page.fetch.add(session, address)

    task = page.worker.work()

    assert (task.state, task.fail_count, task.error["class"]) == ("pending", 1, "HTTPError")
    assert seconds - 30 < seconds_until_due(page, task.id) <= seconds
    make_due(page)
    assert page.worker.work().state == "completed"
    assert stored == [b"here"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_another_status_is_retried_as_usual(recipe, serve):
    page = recipe("Wait after an HTTP 429")
    address = serve([(503, {"Retry-After": "120"}, b"")], [])
    with Session(page.engine) as session, session.begin():
        page.fetch.add(session, address)

    task = page.worker.work()

    assert (task.state, task.fail_count) == ("pending", 1)
    assert seconds_until_due(page, task.id) <= 2


def test_calls_to_the_partner_are_limited(recipe):
    page = recipe("Limit the rate of calls to an API")
    lock, began, running, most = threading.Lock(), [], set(), []

    def call_partner(order_id: int) -> None:
        with lock:
            began.append(time.monotonic())
            running.add(order_id)
            most.append(len(running))
        if order_id == 3:
            running.discard(order_id)
            raise ConnectionError
        until(lambda: len(began) >= 2)  # the first two run at the same time
        running.discard(order_id)

    page.call_partner = call_partner
    with Session(page.engine) as session, session.begin():
        for order_id in range(8):
            page.push_order.using(retry_limit=0).add(session, order_id)

    page.partner_worker.start()

    until(lambda: len(began) == 8)
    assert max(most) == 2
    assert all(third - first >= 0.49 for first, third in zip(began, began[2:], strict=False))


def test_a_large_payload_goes_with_its_task(recipe):
    page = recipe("Pass large data by reference")
    content, parsed = os.urandom(5_000_000), []

    def parse(content: bytes) -> None:
        parsed.append(content)
        if len(parsed) == 1:
            raise ConnectionError

    page.parse = parse
    uploads = sa.select(sa.func.count()).select_from(page.Upload)
    with Session(page.engine) as session, pytest.raises(InvalidData, match="exceed the limit"):
        page.queue.add(session, "parse_upload", content.hex())
    with Session(page.engine) as session, session.begin():
        page.receive(session, content)

    page.worker.work()
    with page.engine.connect() as connection:
        assert connection.scalar(uploads) == 1
    make_due(page)
    page.worker.work()

    assert parsed == [content, content]
    with page.engine.connect() as connection:
        assert connection.scalar(uploads) == 0


def test_a_request_id_is_in_the_log_and_in_the_next_task(recipe, caplog):
    page = recipe("Pass a request id")
    caplog.set_level(logging.INFO, "shop")
    caplog.handler.addFilter(page.add_request_id)
    with Session(page.engine) as session, session.begin():
        page.book.using(meta={"request_id": "9f3c"}).add(session, 7)

    page.traced_worker.work()

    (record,) = [record for record in caplog.records if record.name == "shop"]
    assert record.request_id == "9f3c"
    assert [task.meta for task in tasks(page, "print_label")] == [{"request_id": "9f3c"}]
    assert page.request_id.get() == "-"
    caplog.handler.removeFilter(page.add_request_id)


class TestTenants:
    def test_one_worker_runs_the_tasks_of_all_schemas(self, recipe):
        page = recipe("Tenants and several databases")
        sent: list[tuple[str, int]] = []
        page.send = lambda *invoice: sent.append(invoice)
        for tenant in page.TENANTS:
            page.create_tenant(tenant)
        with Session(page.engine) as session, session.begin():
            page.add_invoice(session, "north", 1)
            page.add_invoice(session, "south", 2)

        work_all(page.tenant_worker)

        assert sorted(sent) == [("north", 1), ("south", 2)]
        with Session(page.engine) as session:
            for tenant in page.TENANTS:
                mapped = page.queues[tenant].task_class
                assert [task.meta["tenant"] for task in session.scalars(sa.select(mapped))] == [tenant]
        assert tasks(page) == []

    def test_two_workers_run_the_tasks_of_two_databases(self, recipe, clones):
        page = recipe("Tenants and several databases")
        url = clones.take()
        engines = [page.engine, sa.create_engine(url)]
        ran: list[int] = []

        @page.queue.task(type="count")
        def count(number: int) -> None:
            ran.append(number)

        workers = page.make_workers(engines)
        for number, engine in enumerate(engines):
            with Session(engine) as session, session.begin():
                page.queue.add(session, "count", {"number": number})

        for worker in workers:
            worker.start()

        until(lambda: sorted(ran) == [0, 1])
        for worker in workers:
            worker.stop()
        engines[1].dispose()
        clones.give_back(url)


def test_a_resource_is_loaded_once_by_tasks_that_begin_at_the_same_time(recipe):
    page = recipe("Load a resource once per process")
    started: list[object] = []
    loaded: list[object] = []
    used: list[object] = []

    def load_model() -> object:
        until(lambda: len(started) >= 4)  # all slots want it
        loaded.append(object())
        return loaded[-1]

    page.load_model = load_model
    page.predict = lambda model, _image_id: used.append(model)
    page.worker.events.on(TaskStarted, started.append)
    with Session(page.engine) as session, session.begin():
        for image_id in range(8):
            page.classify.add(session, image_id)
    assert loaded == []

    page.worker.start()

    until(lambda: len(used) == 8)
    assert used == loaded * 8


def test_what_is_due_is_run_and_nothing_else(recipe):
    page = recipe("Run what is due and exit")
    page.worker.use("count", lambda task: None)
    with Session(page.engine) as session, session.begin():
        page.queue.add_many(session, "count", [1, 2, 3])
        page.queue.add(session, "count", delay=timedelta(hours=1))

    assert page.run_due_tasks() == 3

    assert [task.state for task in tasks(page)] == ["completed"] * 3 + ["pending"]


@pytest.mark.slow
def test_a_burst_runs_what_is_due(recipe, tmp_path):
    page = recipe("Run what is due and exit")
    (command,) = code_of("Run what is due and exit", "sh")
    (tmp_path / "myapp").mkdir()
    module = """
from apoq import Queue

queue = Queue()


@queue.task(type="greet")
def greet(name: str) -> None: ...
"""
    (tmp_path / "myapp" / "tasks.py").write_text(module, encoding="utf-8")
    with Session(page.engine) as session, session.begin():
        page.queue.add(session, "greet", {"name": "Ann"})
        page.queue.add(session, "greet", {"name": "Bo"}, delay=timedelta(hours=1))

    ran = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pages.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert [task.state for task in tasks(page)] == ["completed", "pending"]


class TestDeleting:
    def test_a_worker_that_keeps_none_deletes_a_task_instead_of_completing_it(self, recipe):
        page = recipe("Delete old tasks")
        page.forgetful_worker.use("t", lambda task: None)
        with Session(page.engine) as session, session.begin():
            page.queue.add(session, "t")

        page.forgetful_worker.work()

        assert tasks(page) == []
        assert page.tidy_worker.options.keep_completed == timedelta(hours=1)

    @pytest.fixture
    def aged(self, recipe) -> Any:
        """Completed and failed tasks, new and old."""
        page = recipe("Delete old tasks")
        old = datetime.now(UTC) - timedelta(days=31)
        with Session(page.engine) as session, session.begin():
            for type_ in ("a", "b"):
                for at in (old, datetime.now(UTC)):
                    session.add(Task(type=type_, state="completed", completed_at=at))
                    session.add(Task(type=type_, state="failed", failed_at=at))
            page.queue.add(session, "a")
        return page

    def test_the_command_deletes_what_ended_long_ago(self, aged):
        (command,) = code_of("Delete old tasks", "sh")

        assert CliRunner().invoke(main, command.split()[1:]).output == "Deleted 4 tasks.\n"

        assert len(tasks(aged)) == 5

    def test_the_function_deletes_old_completed_tasks_of_a_type(self, aged):
        with Session(aged.engine) as session, session.begin():
            assert aged.delete_completed(session, "a", timedelta(days=1)) == 1

        left = Counter((task.type, task.state) for task in tasks(aged))
        assert left["a", "completed"] == 1
        assert (left["b", "completed"], left["a", "failed"], left["a", "pending"]) == (2, 2, 1)


class TestANewSignature:
    def test_the_first_step_runs_what_the_old_code_has_added(self, recipe):
        # In another queue, because queues of the same name share their tasks in a process.
        old = recipe("Change the signature of a typed task", blocks=slice(1), queue=Queue("old"))
        new = recipe("Change the signature of a typed task", blocks=slice(1, None))
        delivered: list[tuple[int, str]] = []
        new.deliver = lambda *order: delivered.append(order)
        with Session(old.engine) as session, session.begin():
            old.invoice.add(session, 1)
            new.send_invoice_mail.add(session, 2, locale="fr")
            session.execute(sa.update(Task).values(queue="default"))

        work_all(new.worker)

        assert sorted(delivered) == [(1, "en"), (2, "fr")]

    def test_the_old_code_refuses_an_argument_that_it_does_not_know(self, recipe):
        old = recipe("Change the signature of a typed task", blocks=slice(1))
        with Session(old.engine) as session, session.begin():
            Queue().add(session, "invoice", {"order_id": 1, "locale": "fr"})
            Queue().add(session, "send_invoice_mail", {"order_id": 1})

        work_all(old.worker)

        fitting, unknown = tasks(old)
        assert (fitting.state, fitting.error["class"]) == ("pending", "InvalidArguments")
        assert (unknown.state, unknown.fail_count) == ("pending", 0)
