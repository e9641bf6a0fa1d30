"""The pages of the dashboard, and what people can change by them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from viewers import Viewer, listed, next_page, text_of

from apoq import Queue, Worker
from apoq.cli import main
from apoq.core.states import STATES
from apoq.dashboard.dashboard import Dashboard
from apoq.dashboard.pages import PAGES
from apoq.dashboard.site import Site
from apoq.dashboard.snapshots import MAX_SNAPSHOTS, SECONDS
from apoq.monitor.browse import PAGE, VIEWS

LONG_ERRORS = """
    INSERT INTO apoq_tasks (queue, type, state, failed_at, error)
    SELECT 'emails', 'a', 'failed', now(), jsonb_build_object(
        'class', CAST(:long AS text), 'message', repeat(md5(CAST(n AS text)), 9000))
    FROM generate_series(1, 5) AS n
"""

UNREADABLE = (
    "to_jsonb((SELECT string_agg(md5(n::text), '') FROM generate_series(1, 100000) AS n))",
    "(repeat('[', 3000) || repeat(']', 3000))::jsonb",
)
"""Data that are too large for a page, and too deep for Python."""

TRACE = """Traceback (most recent call last):
  File "/usr/lib/python3/site-packages/lib.py", line 3, in call
    go()
  File "/srv/shop/tasks.py", line 12, in send
    smtp(user)
ValueError: nobody
"""

DASH = "\N{EN DASH}"
EMAILS, REPORTS = Queue("emails"), Queue("reports")

QUERY = "state=failed&action=retry&name=emails&queue=emails&of=queue"
"""For a page of any path."""

FILL = """
    INSERT INTO apoq_tasks (queue, type, state, priority, created_at, process_at, completed_at, failed_at,
                            cancelled_at, fail_count, error)
    SELECT CASE n % 3 WHEN 0 THEN 'reports' ELSE 'emails' END, CASE n % 2 WHEN 0 THEN 'a' ELSE 'b' END,
           :state, CASE WHEN :state = 'pending' THEN n % 2 ELSE 0 END, at, at + CAST(:later AS interval),
           CASE :state WHEN 'completed' THEN at END, CASE :state WHEN 'failed' THEN at END,
           CASE :state WHEN 'cancelled' THEN at END, CAST(:fail_count AS int),
           CASE :state WHEN 'failed' THEN jsonb_build_object('class', 'Error' || n % 2, 'message', 'no') END
    FROM (SELECT n, now() - interval '2 hours' + (n / CAST(:ties AS int)) * interval '1 second' AS at
          FROM generate_series(1, CAST(:count AS int)) AS n) AS new
"""


def fill(
    engine: sa.Engine, state: str, count: int, *, ties: int = 1, later: str = "0", fail_count: int = 0
) -> None:
    values = {"state": state, "count": count, "ties": ties, "later": later, "fail_count": fail_count}
    with engine.begin() as connection:
        connection.execute(sa.text(FILL), values)


def ids_in(engine: sa.Engine, condition: str) -> set[int]:
    with engine.connect() as connection:
        return set(connection.scalars(sa.text(f"SELECT id FROM apoq_tasks WHERE {condition}")))


def state_of(engine: sa.Engine, task_id: int) -> str:
    with engine.connect() as connection:
        return connection.execute(
            sa.text("SELECT state FROM apoq_tasks WHERE id = :id"), {"id": task_id}
        ).scalar_one()


def walk(viewer: Viewer, address: str, most: int = 100) -> list[int]:
    """Return the tasks of all pages of a list."""
    found: list[int] = []
    following: str | None = address
    for _ in range(most):
        if following is None:
            return found
        page = viewer.get(following)
        found += listed(page)
        following = next_page(page)
    raise AssertionError(f"the list doesn't end: {following}")


def test_a_page_of_an_empty_database_says_that_there_is_nothing(writer):
    for path in PAGES:
        response = writer.ask("GET", f"{path}?{QUERY}")

        assert response.status == 200
        assert "apoq" in text_of(response)


def test_every_page_shows_tasks_in_each_state(engine, writer):
    for state in STATES:
        fill(engine, state, 3)

    pages = {path: writer.ask("GET", f"{path}?{QUERY}") for path in PAGES}
    tasks = [writer.get(f"/tasks/{task_id}") for task_id in ids_in(engine, "true")]

    assert {path: page.status for path, page in pages.items()} == dict.fromkeys(PAGES, 200)
    assert all("Timeline" in task for task in tasks)


@pytest.fixture(scope="module")
def filled(template, create_database, drop_database) -> Iterator[sa.Engine]:
    """A database with tasks in each state, many of which ended at the same time."""
    url = create_database(template.database)
    engine = sa.create_engine(url)
    pending = {"ready": "0", "scheduled": "1 day", "retrying": "1 day"}
    for ties in (1, 40, 200):
        for kind in ("failed", "cancelled", "completed", "waiting"):
            fill(engine, kind, 40, ties=ties)
        for view, later in pending.items():
            fill(engine, "pending", 40, ties=ties, later=later, fail_count=view == "retrying")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "WITH taken AS (UPDATE apoq_tasks SET state = 'running', claimed_at = now() WHERE id IN "
            "(SELECT id FROM apoq_tasks WHERE state = 'pending' AND process_at <= now() ORDER BY id LIMIT 60)"
            " RETURNING id) INSERT INTO apoq_claims SELECT gen_random_uuid(), 1, array_agg(id) FROM taken"
        )
    yield engine
    engine.dispose()
    drop_database(url)


@pytest.mark.parametrize("queue", ["", "emails"])
def test_the_pages_of_a_list_have_each_task_once(filled, queue):
    conditions = {
        "ready": "state = 'pending' AND process_at <= now()",
        "scheduled": "state = 'pending' AND process_at > now()",
        "retrying": "state = 'pending' AND process_at > now() AND fail_count > 0",
        "": "true",
    }
    site = Site(filled, schema=None, redact=None, environment=None, secret=None)
    viewer = Viewer(Dashboard(site))

    for state in ("", *VIEWS):
        condition = conditions.get(state, f"state = '{state}'") + (f" AND queue = '{queue}'" if queue else "")
        found = walk(viewer, f"/tasks?state={state}&queue={queue}")

        assert len(found) > PAGE
        assert sorted(found) == sorted(ids_in(filled, condition)), state
    site.close()


def test_a_list_of_ended_tasks_begins_with_the_last_one(engine, reader):
    fill(engine, "failed", 60, ties=7)

    found = walk(reader, "/tasks?state=failed")

    with engine.connect() as connection:
        rows = connection.scalars(sa.text("SELECT id FROM apoq_tasks ORDER BY failed_at DESC, id DESC"))
        assert found == list(rows)


def test_more_tasks_that_ended_at_once_than_are_examined_are_left_out_with_a_note(engine, reader):
    fill(engine, "cancelled", 2_300, ties=10_000)
    fill(engine, "cancelled", 20)

    page, pages, said = reader.get("/tasks?state=cancelled&queue=emails&type=b"), 1, 0
    while (following := next_page(page)) and pages < 60:
        page, pages = reader.get(following), pages + 1
        said += "More tasks ended at the same moment" in page

    assert following is None
    assert said == 1


@pytest.mark.parametrize("given", ["type=a", "queue=reports", "error=Error1", "type=a&error=Error0"])
def test_filters_are_combined(engine, reader, given):
    fill(engine, "failed", 40)
    fill(engine, "completed", 40)
    columns = {"type": "type", "queue": "queue", "error": "error->>'class'"}
    conditions = [
        f"{columns[name]} = '{value}'"
        for name, _, value in (each.partition("=") for each in given.split("&"))
    ]

    found = walk(reader, f"/tasks?state=failed&{given}")

    assert sorted(found) == sorted(ids_in(engine, " AND ".join(["state = 'failed'", *conditions])))


def test_a_filter_that_matches_only_old_tasks_goes_on_page_by_page(engine, reader):
    with engine.begin() as connection:
        rare = EMAILS.add(connection, "rare").id
        connection.execute(
            sa.text("UPDATE apoq_tasks SET state = 'completed', completed_at = now() - interval '1 day'")
        )
    fill(engine, "completed", 3_500)

    first = reader.get("/tasks?state=completed&type=rare")

    assert listed(first) == []
    assert "None of the tasks that were examined so far matches" in first
    assert walk(reader, "/tasks?state=completed&type=rare") == [rare]


def test_a_task_that_holds_a_key_is_found_among_any_number(engine, reader):
    with engine.begin() as connection:
        task = EMAILS.add(connection, "invoice", unique_key="invoice-7")
    fill(engine, "pending", 2_000)

    assert listed(reader.get("/tasks?key=invoice-7")) == [task.id]
    assert listed(reader.get("/tasks?state=failed&key=invoice-7")) == []


def test_an_error_of_any_length_can_be_searched_for(engine, reader):
    long = "E" * 4_000
    with engine.begin() as connection:
        connection.execute(sa.text(LONG_ERRORS), {"long": long})

    assert len(listed(reader.get(f"/tasks?state=failed&error={long}"))) == 5
    assert "EEEE" in reader.get("/failures")


def test_a_list_sends_as_many_statements_for_many_tasks_as_for_one(engine, site, reader):
    counts = []
    for number in (1, 25):
        fill(engine, "failed", number)
        sent: list[str] = []
        listener = lambda *args, sent=sent: sent.append(args[2])  # noqa: E731
        sa.event.listen(site.engine, "before_cursor_execute", listener)
        site.snapshots.forget()
        reader.get("/tasks?state=failed")
        sa.event.remove(site.engine, "before_cursor_execute", listener)
        counts.append(len(sent))

    assert counts[0] == counts[1]


def test_viewers_share_a_snapshot(engine, site, reader, writer):
    sent: list[str] = []
    writer.get("/")
    sa.event.listen(site.engine, "before_cursor_execute", lambda *args: sent.append(args[2]))

    for viewer in (reader, writer, Viewer(reader.dashboard)):
        viewer.get("/")

    assert sent == []


def test_a_page_is_read_in_a_read_only_snapshot(engine, site):
    def write(connection: sa.Connection) -> None:
        shown = connection.exec_driver_sql("SHOW transaction_isolation").scalar_one()
        timeout = connection.exec_driver_sql("SHOW statement_timeout").scalar_one()
        assert (shown, timeout) == ("repeatable read", "2s")
        connection.exec_driver_sql("DELETE FROM apoq_tasks")

    with pytest.raises(sa.exc.InternalError, match="read-only transaction"):
        site.snapshots.get("write", write)


def test_the_data_of_a_task_are_shown_without_secrets_and_cut(engine, reader):
    secrets = {"password": "p1", "nested": [{"Api_Token": "p2"}], "card_number": "p3", "text": "x" * 20_000}
    with engine.begin() as connection:
        task = EMAILS.add(connection, "pay", secrets, meta={"authorization": "p4", "tenant": "acme"})

    page = reader.get(f"/tasks/{task.id}")

    assert not any(secret in page for secret in ("p1", "p2", "p3", "p4"))
    assert "acme" in page
    assert page.count("xxxx") < 10_000 / 4
    assert "Cut at 10 kB" in page


@pytest.mark.parametrize("is_broken", [False, True])
def test_redact_decides_about_the_data(engine, is_broken, caplog):
    def redact(type_, data):
        assert not is_broken
        return {"type": type_, "name": data["name"][0]}

    site = Site(engine, schema=None, redact=redact, environment=None, secret=None)
    with engine.begin() as connection:
        task = EMAILS.add(connection, "greet", {"name": "Ada", "email": "ada@example.org"})
    viewer = Viewer(Dashboard(site))

    pages = viewer.get(f"/tasks/{task.id}") + viewer.get("/tasks")
    site.close()

    assert "ada@" not in pages
    assert "Ada" not in pages
    assert ("redact= failed" in pages) == is_broken == ("redact raised" in caplog.text)


def test_data_that_are_too_large_or_too_deep_are_not_shown(engine, reader):
    with engine.begin() as connection:
        for data in UNREADABLE:
            connection.exec_driver_sql(f"INSERT INTO apoq_tasks (type, data) SELECT 'a', {data}")

    pages = [reader.get(f"/tasks/{task_id}") for task_id in sorted(ids_in(engine, "true"))]

    assert "not shown here" in pages[0]
    assert "Python can" in pages[1]
    assert len(listed(reader.get("/tasks"))) == 2


def test_the_error_of_a_task_begins_with_the_users_own_frame(engine, reader):
    error = {"class": "ValueError", "message": "nobody", "traceback": TRACE}
    fill(engine, "failed", 1)
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE apoq_tasks SET error = CAST(:error AS jsonb)"), {"error": json.dumps(error)}
        )
    (task_id,) = ids_in(engine, "true")

    said = text_of(reader.get(f"/tasks/{task_id}"))

    assert "ValueError : nobody in send , /srv/shop/tasks.py, line 12 smtp(user) Traceback" in said


def test_failures_are_grouped(engine, writer):
    fill(engine, "failed", 40)

    said = text_of(writer.get("/failures"))

    assert "20 b Error1 no" in said
    assert "20 a Error0 no" in said


def test_the_overview_counts_the_tasks_of_each_queue(engine, reader):
    fill(engine, "pending", 30)
    fill(engine, "pending", 30, later="1 day")
    fill(engine, "waiting", 30)
    fill(engine, "failed", 90)
    fill(engine, "completed", 90)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE apoq_tasks SET completed_at = now() WHERE state = 'completed'")
        REPORTS.pause(connection, reason="the disk is full")

    page = reader.get("/")

    assert "emails 20 20 20 for other tasks or a limit 0 60 120 min 60" in text_of(page)
    assert "the disk is full" in page
    assert "<svg" in page


def test_counts_stop_at_a_bound(engine, reader):
    fill(engine, "pending", 3_300)
    fill(engine, "failed", 3_300)

    assert "emails 1,000+ 0 0 0 1,000+ " in text_of(reader.get("/"))


def test_failed_tasks_are_counted_apart_from_cancelled_ones(engine, reader):
    fill(engine, "cancelled", 300)
    fill(engine, "failed", 90)

    page = reader.get("/")

    assert f"emails 0 0 0 0 60 {DASH} 0" in text_of(page)
    assert '<a class="late" href="./failures?queue=emails">60</a>' in page
    fill(engine, "cancelled", 3_300)
    reader.dashboard.site.snapshots.forget()
    assert re.search(rf"emails 0 0 0 0 \d+\+ {DASH} 0", text_of(reader.get("/")))


def test_many_queues_are_shown_page_by_page(engine, reader):
    with engine.begin() as connection:
        for number in range(45):
            Queue(f"q{number:02}").add(connection, "a")

    pages = [reader.get("/"), reader.get("/?after=q19"), reader.get("/?after=q39")]

    assert [page.count("<tr role") - 1 for page in pages] == [20, 20, 5]


def test_a_task_is_retried_and_cancelled(engine, writer):
    fill(engine, "failed", 1)
    (task_id,) = ids_in(engine, "true")

    said = [
        writer.act("retry", id=task_id),
        writer.act("retry", id=task_id),
        writer.act("cancel", id=task_id, reason="a mistake"),
        writer.act("cancel", id=task_id),
    ]

    assert said == [
        f"Retried task {task_id}.",
        f"Task {task_id} was not changed: it has not ended, or another task holds its unique key.",
        f"Cancelled task {task_id}.",
        f"Task {task_id} was not changed: it had already ended.",
    ]
    assert "a mistake" in writer.get(f"/tasks/{task_id}")


def test_a_message_is_shown_once(engine, writer):
    writer.act("pause", queue="emails")

    assert 'role="status">' not in writer.get("/")


def test_a_queue_and_a_type_are_paused_and_resumed(engine, writer):
    with engine.begin() as connection:
        EMAILS.add(connection, "welcome")
    worker = Worker(engine, EMAILS)
    worker.use("welcome", lambda task: None)

    said = [
        writer.act("pause", queue="emails", reason="the mail server is away", length="1h"),
        writer.act("pause", queue="emails", type="welcome"),
    ]
    page = writer.get("/queue?name=emails")
    assert worker.work() is None
    said += [
        writer.act("resume", queue="emails", type="welcome"),
        writer.act("resume", queue="emails"),
        writer.act("resume", queue="emails"),
    ]

    assert worker.work() is not None
    assert "the mail server is away" in page
    assert "The type welcome of emails is paused" in text_of(page)
    assert said == [
        "Paused the queue emails. Running tasks continue.",
        "Paused the type welcome of the queue emails. Running tasks continue.",
        "Resumed the type welcome of the queue emails.",
        "Resumed the queue emails.",
        "The queue emails was not paused.",
    ]


def test_a_schedule_is_run_paused_and_resumed(engine, writer):
    with engine.begin() as connection:
        EMAILS.schedule(connection, "nightly", "digest", every=timedelta(days=1))
    form = {"queue": "emails", "schedule": "nightly"}

    said = [
        writer.act(f"{action}-schedule", **form) for action in ("run", "pause", "pause", "resume", "resume")
    ]

    assert said == [
        f"Added task {min(ids_in(engine, 'true'))} of the schedule nightly.",
        "Paused the schedule nightly.",
        "The schedule nightly is paused already.",
        "Resumed the schedule nightly.",
        "The schedule nightly is not paused.",
    ]


@pytest.mark.as_owner("the role is the test's own")
def test_a_role_that_may_only_read_has_no_buttons(engine, url, admin):
    with engine.begin() as connection:
        EMAILS.add(connection, "a")
        connection.exec_driver_sql("DROP ROLE IF EXISTS apoq_viewer")
        connection.exec_driver_sql("CREATE ROLE apoq_viewer LOGIN PASSWORD 'v'")
        connection.exec_driver_sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO apoq_viewer")
    only_reads = sa.create_engine(url, connect_args={"options": "-c role=apoq_viewer"})
    site = Site(only_reads, schema=None, redact=None, environment=None, secret=None)
    viewer = Viewer(Dashboard(site), "write")

    pages = viewer.get("/") + viewer.get("/tasks") + viewer.get(f"/tasks/{min(ids_in(engine, 'true'))}")
    pages += viewer.get("/keys") + viewer.get("/many?action=cancel&state=ready")
    refused = viewer.post({"action": "pause", "queue": "emails", "token": viewer.token()})

    site.close()
    only_reads.dispose()
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP OWNED BY apoq_viewer")
        connection.exec_driver_sql("DROP ROLE apoq_viewer")
    assert 'method="post"' not in pages
    assert refused.status == 403
    assert "may not change that" in text_of(refused)


def test_a_role_with_the_grants_of_an_operator_may_make_each_change(engine, url):
    role = f"{url.database}_operator"
    address = url.render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD 'o'")
        EMAILS.schedule(connection, "nightly", "digest", every=timedelta(days=1))
    fill(engine, "failed", 4)
    failed = min(ids_in(engine, "true"))
    done = CliRunner().invoke(main, ["grants", "--operator", role, "--apply", "--database-url", address])
    operator = sa.create_engine(url, connect_args={"options": f"-c role={role}"})
    site = Site(operator, schema=None, redact=None, environment=None, secret=None)
    viewer = Viewer(Dashboard(site), "write")
    its = {"queue": "emails", "schedule": "nightly"}
    limit = {"queue": "emails", "of": "queue", "confirmed": "yes"}
    many = {"until": "2100-01-01T00:00:00+00:00", "at_most": 10}

    rights = site.rights()
    said = [
        viewer.act("retry", id=failed),
        viewer.act("cancel", id=failed),
        viewer.act("retry-many", state="failed", **many),
        viewer.act("cancel-many", state="ready", **many),
        viewer.act("pause", queue="emails"),
        viewer.act("resume", queue="emails"),
        viewer.act("limit", at_most=0, **limit),
        viewer.act("remove-limit", **limit),
        *(viewer.act(f"{action}-schedule", **its) for action in ("run", "pause", "resume")),
    ]

    site.close()
    operator.dispose()
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert done.exit_code == 0, done.output
    assert all(rights)
    assert [each.split()[0] for each in said] == [
        *("Retried", "Cancelled", "Retried", "Cancelled", "Paused", "Resumed"),
        *("Limited", "Removed", "Added", "Paused", "Resumed"),
    ]


def test_a_database_that_is_away_is_a_page(engine):
    away = sa.create_engine(engine.url.set(query={"host": "127.0.0.1", "port": "1"}))
    site = Site(away, schema=None, redact=None, environment=None, secret=None)

    response = Viewer(Dashboard(site), "write").ask("GET", "/")
    site.close()

    assert response.status == 503
    assert "The database is away" in text_of(response)


def test_a_database_at_another_version_is_a_page_that_says_what_to_do(engine, reader):
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE apoq_migrations SET version_num = '0999'")

    response = reader.ask("GET", "/tasks")

    assert response.status == 503
    assert "newer" in text_of(response) or "upgrade" in text_of(response)


def test_a_locked_table_is_a_page_and_not_a_wait(engine, reader):
    with engine.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE apoq_tasks IN ACCESS EXCLUSIVE MODE")
        response = reader.ask("GET", "/tasks?state=failed")

    assert response.status == 503
    assert "locked" in text_of(response)


def test_a_slow_database_is_a_page_and_is_not_asked_again_at_once(engine, site, reader, monkeypatch):
    sent: list[str] = []
    sa.event.listen(site.engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    monkeypatch.setitem(
        PAGES,  # type: ignore[arg-type]
        "/",
        lambda site, _: site.snapshots.get("x", lambda c: c.exec_driver_sql("SELECT pg_sleep(9)")),
    )

    responses = [reader.ask("GET", "/") for _ in range(3)]

    assert {text_of(each) for each in responses} == {text_of(responses[0])}
    assert "took too long and was cancelled" in text_of(responses[0])
    assert sum("pg_sleep" in each for each in sent) == 1


def test_a_page_or_task_that_does_not_exist_is_not_found(reader):
    for path in ("/tasks/7", "/tasks/99999999999999999999", "/nothing", "/static/../x", "/tasks/"):
        assert reader.ask("GET", path).status == 404


def test_an_address_with_invalid_filters_is_a_page(reader):
    for query in ("after=x", "after=2026-01-01T00:00:00~x", "after=~", "state=nothing", "type=%F0%9F%92%96"):
        assert reader.ask("GET", f"/tasks?{query}").status == 200


def test_tables_in_a_schema_are_shown_with_its_name(engine):
    from apoq import prepare

    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA jobs")
    prepare(engine, schema="jobs")
    queue = Queue("imports", schema="jobs")
    with engine.begin() as connection:
        task = queue.add(connection, "load")
    site = Site(engine, schema="jobs", redact=None, environment="Production", secret=None)
    viewer = Viewer(Dashboard(site), "write")

    page, said = viewer.get("/tasks"), viewer.act("cancel", id=task.id)
    site.close()

    assert "schema jobs" in text_of(page)
    assert 'class="tag production"' in page
    assert said == f"Cancelled task {task.id}."


def test_a_change_is_logged_with_the_address_of_the_viewer(writer, caplog):
    with caplog.at_level("INFO", "apoq.dashboard"):
        writer.act("pause", queue="emails\nforged line")

    assert "Paused the queue emails forged line." in caplog.text
    assert "(in the dashboard, from 203.0.113.7)" in caplog.text


def test_snapshots_do_not_fill_the_memory(site):
    for number in range(3 * MAX_SNAPSHOTS):
        site.snapshots.get(("number", number), lambda _connection, number=number: number)

    assert len(site.snapshots) <= MAX_SNAPSHOTS


def test_few_scheduled_tasks_are_counted_among_many_ready_ones(engine, reader):
    fill(engine, "pending", 3_300)
    fill(engine, "pending", 12, later="1 day")
    fill(engine, "waiting", 3_300)

    assert "emails 1,000+ 8 1,000+ " in text_of(reader.get("/"))
    fill(engine, "pending", 90, later="1 day")
    reader.dashboard.site.snapshots.forget()
    assert "emails 1,000+ 30+ 1,000+ " in text_of(reader.get("/"))


def test_a_task_is_shown_with_its_progress_and_its_result(engine, reader):
    fill(engine, "completed", 1)
    (task_id,) = ids_in(engine, "true")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO apoq_progress SELECT id, 1, 120, 300, 'the second file', now() FROM apoq_tasks"
        )
        connection.exec_driver_sql("""UPDATE apoq_tasks SET result = '{"rows": 7, "token": "s3cret"}'""")

    page = reader.get(f"/tasks/{task_id}")

    assert "Progress 120 of 300, the second file" in text_of(page)
    assert '"rows": 7, "token": "[hidden]"' in text_of(page)
    assert "s3cret" not in page


def test_running_tasks_may_be_more_if_the_log_of_claims_is_longer_than_what_is_read(engine, writer):
    fill(engine, "running", 3)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO apoq_claims SELECT gen_random_uuid(), 1, array_agg(n) "
            "FROM generate_series(100001, 102000) AS n"
        )
        connection.exec_driver_sql(
            "INSERT INTO apoq_claims SELECT gen_random_uuid(), 1, array_agg(id) FROM apoq_tasks"
        )

    assert "Running 0+ " in text_of(writer.get("/"))
    assert "Ready 2 Scheduled 0 Waiting 0 Running 0+ " in text_of(writer.get("/queue?name=emails"))
    assert "There may be more running tasks" in text_of(writer.get("/tasks?state=running"))
    assert "At least 0 match" in text_of(writer.get("/many?action=cancel&state=running"))


def test_a_task_of_a_live_worker_that_is_not_listed_has_a_live_worker(engine, writer):
    fill(engine, "running", 3)
    with engine.begin() as connection:
        connection.exec_driver_sql("""
            INSERT INTO apoq_workers (id, host, pid, version, queues, concurrency, expires_at, grace,
                                      last_heartbeat_at)
            SELECT md5(CAST(n AS text))::uuid, 'web', n, '1', '{emails}', 1, now() + interval '1 day',
                   interval '1 day', now() - n * interval '1 second' FROM generate_series(1, 201) AS n;
            UPDATE apoq_tasks SET worker_id = md5('201')::uuid;
            INSERT INTO apoq_claims SELECT md5('201')::uuid, 1, array_agg(id) FROM apoq_tasks
        """)

    page = text_of(writer.get("/"))

    assert "Workers alive 200+ " in page
    assert "have no live worker" not in page
    assert "There are more workers: only the 200" in text_of(writer.get("/workers"))
    assert "200+ alive" in text_of(writer.get("/doctor"))


def test_the_doctor_names_a_late_task_beside_a_pause_of_another_type(engine, writer):
    with engine.begin() as connection:
        EMAILS.pause(connection, type="b")
        EMAILS.add(connection, "a")
        connection.exec_driver_sql("UPDATE apoq_tasks SET process_at = now() - interval '10 minutes'")
    assert "'emails' has had a task of type 'a' due for 10 min" in text_of(writer.get("/doctor"))

    writer.dashboard.site.snapshots.forget()
    with engine.begin() as connection:
        EMAILS.pause(connection, type="a")
    assert "no task has been due for more than 60 s" in text_of(writer.get("/doctor"))


def test_the_doctor_says_if_it_checks_only_the_first_queues(engine, writer):
    with engine.begin() as connection:
        for number in range(21):
            Queue(f"queue {number:02}").add(connection, "a")

    assert "only the first 20 queues were checked" in text_of(writer.get("/doctor"))
    assert "Running (these 20 queues)" in text_of(writer.get("/"))


def test_an_error_is_kept_for_a_shorter_time_than_a_value(site):
    reads = []

    def read(_connection: sa.Connection) -> int:
        reads.append(None)
        if len(reads) == 1:
            raise ZeroDivisionError
        return 7

    def get() -> int:
        return site.snapshots.get("number", read, seconds=30 * SECONDS)

    with pytest.raises(ZeroDivisionError):
        get()
    with pytest.raises(ZeroDivisionError):
        get()

    time.sleep(SECONDS)
    assert [get(), get()] == [7, 7]
    assert len(reads) == 2


def test_many_pauses_are_not_all_listed_and_hide_no_pause_of_the_page(engine, writer):
    with engine.begin() as connection:
        for number in range(120):
            Queue("a").pause(connection, type=f"type {number}")
        Queue("z").add(connection, "t")
        Queue("z").pause(connection)

    page = text_of(writer.get("/"))

    assert "The queue z is paused" in page
    assert page.count("is paused") == 100
    assert "Only 100 pauses are listed. There are more." in page
    assert "there are more pauses than these" in text_of(writer.get("/doctor"))


def test_redact_may_return_keys_that_are_not_json(engine):
    with engine.begin() as connection:
        task = EMAILS.add(connection, "a", {"x": 1})
    site = Site(engine, schema=None, redact=lambda _type, _data: {(1, 2): 3}, environment=None, secret=None)

    page = Viewer(Dashboard(site)).get(f"/tasks/{task.id}")
    site.close()

    assert '"(1, 2)": 3' in text_of(page)


def test_spaces_of_other_widths_and_joined_emojis_are_shown(engine, reader):
    text = "a\u00a0b\u3000c 👩\u200d🔧 d"
    with engine.begin() as connection:
        task = EMAILS.add(connection, text, {"text": f"{text}\u202e"})

    page = reader.get(f"/tasks/{task.id}")

    assert f"</span> {text} <span" in page
    assert f"{text}\N{REPLACEMENT CHARACTER}&#34;" in page
