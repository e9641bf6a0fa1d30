"""The dashboard in a real browser: by mouse and keyboard, on a phone, in the dark, without JavaScript."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import pytest
import sqlalchemy as sa
import uvicorn
from waiting import patience

from apoq import Queue, Worker
from apoq.dashboard.asgi_face import DashboardApp
from apoq.dashboard.dashboard import Dashboard
from apoq.dashboard.site import Site

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
HAS_PLAYWRIGHT = find_spec("playwright") is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_PLAYWRIGHT, reason="Playwright is not installed: pip install playwright"),
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: install it, or set CHROMIUM to its path"),
]

until = patience(20.0)

EMAILS = Queue("emails")
PATHS = (
    *("", "queue?name=emails", "tasks", "tasks?state=failed", "tasks?type=none", "tasks/{failed}"),
    *("tasks/{pending}", "many?action=retry&state=failed", "failures", "schedules", "workers", "doctor"),
    *("keys", "keys?waiting=1", "keys?name=none", "limit?queue=emails&of=key&name=tenant-7&at_most=0"),
    *("limit?queue=emails&of=key&name=tenant-7", "tasks/{closing}", "tasks/{member}"),
    "tasks/999999",
)


KEYED = """
    INSERT INTO apoq_workers (id, host, pid, version, queues, concurrency, expires_at, grace)
    VALUES (md5('w')::uuid, 'web-1', 7, '0.1.0', '{emails}', 8, now() + interval '1 day', interval '1 day');
    INSERT INTO apoq_tasks (queue, type, state, key, slot, claimed_at, worker_id)
    VALUES ('emails', 'charge', 'running', 'tenant-7', 0, now(), md5('w')::uuid),
           ('emails', 'charge', 'running', 'tenant-7', 1, now(), md5('w')::uuid),
           ('emails', 'charge', 'running', 'tenant-8', 0, now(), md5('w')::uuid);
    INSERT INTO apoq_tasks (queue, type, state, key, waiting_for, waiting_since)
    SELECT 'emails', 'charge', 'waiting', 'tenant-7', 'key', now() - interval '1 hour'
    FROM generate_series(1, 120)
"""
"""Two keys, of which one is full."""


class Served:
    """A dashboard on a port; a cookie says whether the viewer is a writer or a reader."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.site = Site(engine, schema=None, redact=None, environment="test", secret=None)
        self.app = DashboardApp(Dashboard(self.site), self.role_of, None)
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, port=0, log_level="critical", lifespan="off", ws="none")
        )
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://localhost:{port}/"
        self.ids: dict[str, int] = {}

    def role_of(self, request: Any) -> str:
        return request.cookies.get("role", "read")

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.app.close()


@pytest.fixture
def served(engine) -> Iterator[Served]:
    def fail(task: Any) -> None:
        raise ConnectionError("the mail server is away")

    served = Served(engine)
    worker = Worker(engine, EMAILS)
    worker.use("invoice", fail, retry_limit=0)
    with engine.begin() as connection:
        served.ids["failed"] = EMAILS.add(connection, "invoice", {"id": 7, "token": "x"}, meta={"a": 1}).id
        EMAILS.add_many(connection, "invoice", [{"id": n} for n in range(3)])
        EMAILS.schedule(connection, "nightly", "digest", every=timedelta(days=1))
        Queue("imports").pause(connection, reason="the disk is full")
    while worker.work():
        pass
    with engine.begin() as connection:
        served.ids["pending"] = EMAILS.add(connection, "welcome", {"user": "Ada"}).id
        Queue("imports").add(connection, "load", delay=60)
        EMAILS.limit(connection, 2, key="tenant-7")
        EMAILS.limit(connection, 0, type="digest")
        with EMAILS.group(connection) as group:
            served.ids["member"] = group.add(
                "import a row with a name that is longer than a phone is wide"
            ).id
            group.add_many("row", [{}] * 30)
            group.then("report")
        served.ids["closing"] = connection.scalar(sa.text("SELECT id FROM apoq_tasks WHERE type = 'report'"))
        for statement in KEYED.split(";"):
            connection.exec_driver_sql(statement)
    yield served
    served.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, served) -> Iterator[Callable[..., Any]]:
    contexts: list[Any] = []

    def open_page(role: str = "write", **options: Any) -> Any:
        context = browser.new_context(base_url=served.address, **options)
        context.add_cookies([{"name": "role", "value": role, "url": served.address}])
        contexts.append(context)
        page = context.new_page()
        page.problems = problems = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        return page

    yield open_page
    for context in contexts:
        context.close()


def state_of(engine: sa.Engine, task_id: int) -> str:
    with engine.connect() as connection:
        statement = sa.text("SELECT state FROM apoq_tasks WHERE id = :id")
        return str(connection.execute(statement, {"id": task_id}).scalar_one())


def notice(page: Any) -> str:
    return str(page.locator(".notice").inner_text())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_each_page_is_accessible_fits_and_breaks_no_policy(served, open_page, width, scheme):
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    axe = None
    if find_spec("axe_playwright_python"):
        from axe_playwright_python.sync_playwright import Axe

        axe = Axe()

    for path in PATHS:
        page.goto(path.format(**served.ids))
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        if axe is not None:
            found = axe.run(page).response["violations"]
            said = [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in SERIOUS]
            assert said == [], path

    assert [problem for problem in page.problems if "404" not in problem] == []


SERIOUS = {"serious", "critical"}


def test_a_task_is_retried_and_cancelled(served, open_page):
    page = open_page()
    page.goto(f"tasks/{served.ids['failed']}")
    assert "ConnectionError" in page.content()

    page.get_by_role("button", name="Retry").click()
    assert notice(page) == f"Retried task {served.ids['failed']}."
    page.locator("summary", has_text="Cancel…").click()
    page.get_by_label("Reason").fill("a <b>mistake</b>")
    page.get_by_role("button", name="Cancel this task").click()

    assert notice(page) == f"Cancelled task {served.ids['failed']}."
    assert "a <b>mistake</b>" in page.locator("main").inner_text()
    assert state_of(served.engine, served.ids["failed"]) == "cancelled"


def test_a_queue_is_paused_and_resumed(served, open_page):
    page = open_page()
    page.goto("")

    page.get_by_label("Pause the queue emails").click()
    form = page.locator("details[open]")
    form.get_by_label("Reason").fill("maintenance")
    form.get_by_label("Until").select_option("in 4 hours")
    form.get_by_role("button", name="Pause").click()
    assert notice(page).startswith("Paused the queue emails")
    assert "maintenance" in page.locator(".banner", has_text="emails").inner_text()

    page.locator(".banner", has_text="emails").get_by_role("button").click()
    assert notice(page) == "Resumed the queue emails."


def test_a_schedule_is_run_paused_and_resumed(served, open_page):
    page = open_page()
    page.goto("schedules")

    said = []
    for label in ("Run now", "Pause", "Resume"):
        page.get_by_role("button", name=f"{label} the schedule nightly").click()
        said.append(notice(page))

    assert said[0].startswith("Added task ")
    assert said[1:] == ["Paused the schedule nightly.", "Resumed the schedule nightly."]


def test_all_failed_tasks_are_retried_after_a_question(served, open_page):
    page = open_page()
    page.goto("failures")

    page.get_by_role("link", name="Retry the failed tasks of invoice").click()
    assert page.locator(".big").inner_text() == "Retry 4 tasks?"
    page.get_by_role("button", name="Retry 4 tasks").click()

    assert notice(page) == "Retried 4 tasks (failed, type invoice, error ConnectionError)."
    assert state_of(served.engine, served.ids["failed"]) == "pending"


def limits(engine: sa.Engine) -> dict[str | None, int | None]:
    with engine.connect() as connection:
        return {each.key or each.type: each.at_most for each in EMAILS.limits(connection)}


def test_a_limit_is_changed_where_its_key_is_full(served, open_page):
    page = open_page()
    page.goto("keys")
    row = page.locator("table.keys tr", has_text="tenant-7")
    assert "full" in row.inner_text()

    row.get_by_label("Limit the key tenant-7").click()
    form = page.locator("details[open]")
    form.get_by_label("At most").fill("9")
    form.get_by_role("button", name="Set the limit").click()

    assert notice(page) == "Limited the key tenant-7 of the queue emails to 9."
    assert limits(served.engine) == {"tenant-7": 9, "digest": 0}
    assert "free" in page.locator("table.keys tr", has_text="tenant-7").inner_text()


def test_a_limit_of_zero_and_a_removal_are_asked_about(served, open_page):
    page = open_page()
    page.goto("keys?queue=emails")
    page.locator("table.keys").get_by_label("Limit the key tenant-7").click()
    page.locator("details[open]").get_by_label("At most").fill("0")
    page.keyboard.press("Enter")
    assert "Let no task of the key tenant-7" in page.locator(".big").inner_text()
    assert limits(served.engine) == {"tenant-7": 2, "digest": 0}
    page.get_by_role("button", name="Let no task begin").click()
    assert notice(page) == "Limited the key tenant-7 of the queue emails to 0."
    assert page.url.endswith("/keys?queue=emails")

    page.get_by_label("Remove the limit that was set for the type digest").click()
    page.get_by_role("button", name="Remove the limit").click()

    assert notice(page) == "Removed the limit that was set for the type digest of the queue emails."
    assert limits(served.engine) == {"tenant-7": 0}


def test_a_limit_is_set_by_keyboard_and_without_javascript(served, open_page):
    page = open_page(java_script_enabled=False)
    page.goto("keys")

    page.get_by_role("textbox", name="Queue").focus()
    page.keyboard.type("emails")
    page.keyboard.press("Tab")
    page.keyboard.type("a type")
    page.keyboard.press("Tab")
    page.keyboard.type("invoice")
    page.keyboard.press("Tab")
    page.keyboard.type("3")
    page.keyboard.press("Enter")

    assert notice(page) == "Limited the type invoice of the queue emails to 3."


def test_the_graph_leads_from_task_to_task_by_keyboard(served, open_page):
    page = open_page("read", viewport={"width": 400, "height": 800})
    page.goto(f"tasks/{served.ids['closing']}")
    assert "11 more" in page.locator("svg.graph").text_content()

    page.locator("svg.graph a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/tasks/{served.ids['member']}")
    page.get_by_text("As a list").click()
    page.locator("details[open]").get_by_role("link", name="report").click()

    page.wait_for_url(f"**/tasks/{served.ids['closing']}")


def test_tasks_are_filtered(served, open_page):
    page = open_page("read")
    page.goto("tasks")

    page.get_by_role("link", name="failed", exact=True).click()
    page.get_by_label("Error").fill("ConnectionError")
    page.get_by_label("Queue").select_option("emails")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Filter").click()

    assert page.locator("tbody tr").count() == 4
    assert "error=ConnectionError" in page.url
    page.get_by_role("link", name="Clear").click()
    assert "error=" not in page.url


def test_readers_have_no_buttons_that_change_something(served, open_page):
    page = open_page("read")

    for path in PATHS:
        page.goto(path.format(**served.ids))
        assert page.locator("form[method=post]").count() == 0, path
        assert page.locator("summary.button").count() == 0, path


def test_it_can_be_used_by_keyboard(served, open_page):
    page = open_page()
    page.goto("")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.locator(".skip").bounding_box()["y"] >= 0  # it is visible now
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.ariaLabel") == "Pause the queue emails":
            break
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("by keyboard")
    page.keyboard.press("Enter")

    page.wait_for_selector(".notice")
    assert "by keyboard" in page.locator("main").inner_text()


def test_without_javascript_everything_works(served, open_page):
    page = open_page(java_script_enabled=False)
    page.goto(f"tasks/{served.ids['pending']}")
    assert "UTC" in page.locator(".timeline").inner_text()

    page.locator("summary", has_text="Cancel…").click()
    page.get_by_role("button", name="Cancel this task").click()

    assert notice(page) == f"Cancelled task {served.ids['pending']}."


def test_times_are_in_the_viewers_zone(served, open_page):
    with served.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE apoq_tasks SET created_at = '2026-01-01T20:00:00Z'")
    page = open_page("read", timezone_id="Asia/Tokyo", locale="en-GB")

    page.goto(f"tasks/{served.ids['failed']}")

    assert "2 Jan 2026, 05:00:00" in page.locator(".timeline").inner_text()
    assert page.locator(".timeline time").first.get_attribute("title") == "2026-01-01 20:00:00 UTC"


def test_it_refreshes_itself_but_not_in_a_hidden_tab_or_when_paused(served, open_page):
    page = open_page("read")
    page.clock.install()
    page.goto("tasks")
    asked: list[str] = []
    page.on("request", lambda each: asked.append(each.url) if each.resource_type == "fetch" else None)
    with served.engine.begin() as connection:
        EMAILS.add(connection, "brand_new")
    served.site.snapshots.forget()

    page.clock.fast_forward(5_500)
    page.wait_for_selector("text=brand_new")
    assert len(asked) == 1
    hide = (
        "is => { Object.defineProperty(document, 'hidden', {configurable: true, get: () => is});"
        " document.dispatchEvent(new Event('visibilitychange')) }"
    )
    page.evaluate(hide, True)
    page.clock.fast_forward(600_000)
    assert len(asked) == 1
    page.evaluate(hide, False)
    until(lambda: page.wait_for_timeout(10) or len(asked) == 2)
    page.get_by_role("button", name="Pause updates").click()
    page.clock.fast_forward(600_000)
    assert len(asked) == 2
    assert page.problems == []


@pytest.mark.parametrize("is_open", [True, False])
def test_a_refresh_keeps_a_traceback_open_or_closed(served, open_page, is_open):
    with served.engine.begin() as connection:
        task_id = EMAILS.add(connection, "flaky", delay=3_600).id
        connection.execute(
            sa.text("UPDATE apoq_tasks SET fail_count = 1, error = :error WHERE id = :id"),
            {"id": task_id, "error": '{"class": "ValueError", "message": "no", "traceback": "a b c"}'},
        )
    page = open_page("read")
    page.clock.install()
    page.goto(f"tasks/{task_id}")
    if not is_open:
        page.get_by_text("Traceback").click()
    with served.engine.begin() as connection:
        connection.execute(sa.text("UPDATE apoq_tasks SET priority = 77 WHERE id = :id"), {"id": task_id})
    served.site.snapshots.forget()

    page.clock.fast_forward(5_500)

    page.wait_for_selector("dd:text-is('77')")
    assert page.locator("details").get_attribute("open") == ("" if is_open else None)


def test_a_refresh_does_not_disturb_a_person_who_fills_in_a_form(served, open_page):
    page = open_page()
    page.clock.install()
    page.goto("")
    page.get_by_label("Pause the queue emails").click()
    page.locator("details[open]").get_by_label("Reason").fill("half a sent")

    page.clock.fast_forward(60_000)

    assert page.locator("details[open]").get_by_label("Reason").input_value() == "half a sent"


def test_a_server_that_is_away_is_said_and_asked_less_and_less(served, open_page):
    page = open_page("read")
    page.clock.install()
    page.goto("")
    page.route("**/*", lambda route: route.abort())

    page.clock.fast_forward(5_500)

    page.wait_for_selector("text=not updated")


def test_another_page_cannot_use_the_viewers_cookies(served, open_page):
    """A form on another origin, as an attacker would write it, changes nothing."""
    page = open_page()
    page.goto(f"tasks/{served.ids['pending']}")
    token = page.locator("input[name=token]").first.get_attribute("value")
    attack = (
        f"<form method=post action='{served.address}actions'><input name=action value=cancel>"
        f"<input name=id value={served.ids['pending']}><input name=token value={token}>"
        "<button>x</button></form>"
    )
    page.route("http://evil.example/", lambda route: route.fulfill(body=attack, content_type="text/html"))
    page.goto("http://evil.example/")

    page.get_by_role("button").click()

    page.wait_for_url("**/actions")
    assert state_of(served.engine, served.ids["pending"]) == "pending"


def test_it_cannot_be_framed(served, open_page):
    page = open_page()
    frame = f"<iframe src='{served.address}'></iframe>"
    page.route("http://evil.example/", lambda route: route.fulfill(body=frame, content_type="text/html"))

    page.goto("http://evil.example/")
    until(lambda: page.wait_for_timeout(10) or page.frames[1].url.startswith("chrome-error"))
