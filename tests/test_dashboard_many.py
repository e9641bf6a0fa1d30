"""Retrying and cancelling all tasks of a list: what is asked, and what is then changed."""

from __future__ import annotations

import html
import re

import pytest
import sqlalchemy as sa
from test_dashboard import fill, ids_in, walk
from viewers import text_of

from apoq import Queue
from apoq.dashboard import many
from apoq.monitor.browse import VIEWS

EMAILS = Queue("emails")
ACTIONS = {"failed": "retry", "cancelled": "retry", "completed": "retry"}
RUNNING = """
    WITH taken AS (UPDATE apoq_tasks SET state = 'running', claimed_at = now() WHERE id IN (
        SELECT id FROM apoq_tasks WHERE state = 'pending' AND process_at <= now() ORDER BY id LIMIT 20
    ) RETURNING id) INSERT INTO apoq_claims SELECT gen_random_uuid(), 1, array_agg(id) FROM taken
"""


def confirmed(page: str) -> dict[str, str]:
    """Return the fields of the form by which the question is confirmed."""
    fields = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page)
    return {name: html.unescape(value) for name, value in fields if name not in {"token", "back"}}


def rows(engine: sa.Engine) -> dict[int, str]:
    with engine.connect() as connection:
        return dict(connection.execute(sa.text("SELECT id, t::text FROM apoq_tasks AS t")).all())


@pytest.fixture
def everything(engine) -> sa.Engine:
    """Tasks in each state, some of which have keys or have failed."""
    for state in ("failed", "cancelled", "completed", "waiting"):
        fill(engine, state, 60, ties=7)
    fill(engine, "pending", 60, ties=7)
    fill(engine, "pending", 60, ties=7, later="1 day")
    fill(engine, "pending", 60, ties=7, later="1 day", fail_count=1)
    with engine.begin() as connection:
        connection.exec_driver_sql(RUNNING)
        connection.exec_driver_sql(
            "UPDATE apoq_tasks SET unique_key = 'k' WHERE mod(id, 7) = 0 AND "
            "state IN ('pending', 'waiting', 'running')"
        )
        connection.exec_driver_sql("UPDATE apoq_tasks SET key = 'k' WHERE mod(id, 11) = 0")
    return engine


@pytest.mark.parametrize("given", ["", "queue=emails&type=a", "key=k"])
@pytest.mark.parametrize("view", VIEWS)
def test_exactly_the_tasks_of_the_list_are_changed(everything, writer, view, given):
    action = ACTIONS.get(view, "cancel")
    query = f"state={view}&{given}"
    listed, before = walk(writer, f"/tasks?{query}"), rows(everything)

    page = writer.get(f"/many?action={action}&{query}")
    said = writer.act(**confirmed(page))

    number = "1 task" if len(listed) == 1 else f"{len(listed)} tasks"
    assert listed
    assert f"{action.capitalize()} {number}?" in text_of(page)
    assert said.startswith(f"{'Retried' if action == 'retry' else 'Cancelled'} {number} ({view}")
    after = rows(everything)
    assert {task_id for task_id in after if after[task_id] != before[task_id]} == set(listed)


def test_a_filter_for_an_error_selects_tasks(engine, writer):
    fill(engine, "failed", 60)

    page = writer.get("/many?action=retry&state=failed&error=Error1")
    said = writer.act(**confirmed(page))

    assert said == "Retried 30 tasks (failed, error Error1)."
    assert ids_in(engine, "state = 'pending'") == ids_in(engine, "error ->> 'class' = 'Error1'")


def test_tasks_that_fail_after_the_question_are_left_as_they_are(engine, writer):
    fill(engine, "failed", 3)
    page = writer.get("/many?action=retry&state=failed")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO apoq_tasks (queue, type, state, failed_at) "
            "VALUES ('emails', 'a', 'failed', clock_timestamp())"
        )

    said = writer.act(**confirmed(page))

    assert "Only tasks that failed until" in text_of(page)
    assert said == "Retried 3 tasks (failed)."
    assert len(ids_in(engine, "state = 'failed'")) == 1


def test_no_more_tasks_than_were_counted_are_changed(engine, writer):
    fill(engine, "failed", 3)
    page = writer.get("/many?action=retry&state=failed")
    fill(engine, "failed", 5)  # which seem to have failed before

    assert writer.act(**confirmed(page)) == "Retried 3 tasks (failed)."
    assert len(ids_in(engine, "state = 'failed'")) == 5


def test_tasks_that_were_changed_in_the_meantime_are_counted(engine, writer):
    fill(engine, "failed", 3)
    page = writer.get("/many?action=retry&state=failed")
    with engine.begin() as connection:
        EMAILS.retry(connection, min(ids_in(engine, "queue = 'emails'")))

    assert writer.act(**confirmed(page)) == (
        "Retried 2 tasks (failed). 1 task had changed in the meantime, or can't be changed now."
    )


def test_tasks_whose_unique_keys_are_taken_are_passed_over(engine, writer, monkeypatch):
    monkeypatch.setattr(many, "BATCH", 2)
    fill(engine, "failed", 9)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE apoq_tasks SET unique_key = 'k' WHERE queue = 'emails' AND id < 6")
        EMAILS.add(connection, "a", unique_key="k")
    page = writer.get("/many?action=retry&state=failed")

    said = writer.act(**confirmed(page))

    kept = len(ids_in(engine, "state = 'failed'"))
    assert kept == len(ids_in(engine, "unique_key = 'k' AND state = 'failed'")) > 1
    assert said.startswith(f"Retried {9 - kept} tasks (failed). {kept} tasks had changed")


def test_more_tasks_than_are_counted_are_changed_in_portions(engine, writer):
    fill(engine, "failed", 16_000, ties=10)

    page = writer.get("/many?action=retry&state=failed&queue=emails")
    said = writer.act(**confirmed(page))

    assert "Retry up to 10,000 tasks? State failed Queue emails More than 10,000 match" in text_of(page)
    assert said == "Retried 10,000 tasks (failed, queue emails)."
    with engine.connect() as connection:
        retried = "SELECT max(created_at) FROM apoq_tasks WHERE state = 'pending'"
        left = "SELECT min(created_at) FROM apoq_tasks WHERE state = 'failed' AND queue = 'emails'"
        assert (
            connection.exec_driver_sql(retried).scalar_one() <= connection.exec_driver_sql(left).scalar_one()
        )


def test_a_filter_that_no_index_has_is_counted_up_to_a_bound(engine, writer):
    fill(engine, "failed", 6_000, ties=10)

    page = writer.get("/many?action=retry&state=failed&queue=emails&type=a")
    said = writer.act(**confirmed(page))

    assert re.search(r"Retry up to 10,000 tasks\? .* At least \d+ match", text_of(page))
    assert said == "Retried 2,000 tasks (failed, queue emails, type a)."
    assert ids_in(engine, "state = 'failed' AND type = 'a' AND queue = 'emails'") == set()


def test_nothing_is_asked_if_no_task_matches(engine, writer):
    fill(engine, "failed", 3)

    assert "No tasks match" in writer.get("/many?action=retry&state=failed&type=none")


def test_it_stops_after_some_time_and_says_so(engine, writer, monkeypatch):
    monkeypatch.setattr(many, "BATCH", 10)
    monkeypatch.setattr(many, "SECONDS", -1.0)
    fill(engine, "failed", 30)
    page = writer.get("/many?action=retry&state=failed&queue=emails")

    said = writer.act(**confirmed(page))

    assert said.startswith("Retried 0 tasks (failed, queue emails).")
    assert said.endswith("repeat it for the others.")


def test_a_problem_after_some_changes_says_how_many_there_were(engine, writer, monkeypatch):
    monkeypatch.setattr(many, "BATCH", 2)
    fill(engine, "failed", 9)
    last = max(ids_in(engine, "queue = 'emails'"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF new.id = {last} THEN RAISE 'not this one'; END IF; RETURN new; END $$;
            CREATE TRIGGER refuse BEFORE UPDATE ON apoq_tasks FOR EACH ROW EXECUTE FUNCTION refuse()
        """)
    page = writer.get("/many?action=retry&state=failed&queue=emails")

    said = writer.act(**confirmed(page))

    assert said == "Retried 4 tasks (failed, queue emails). Then it stopped: not this one."
    assert len(ids_in(engine, "state = 'pending'")) == 4


def test_a_change_is_logged_with_its_filters(engine, writer, caplog):
    fill(engine, "failed", 3)
    page = writer.get("/many?action=retry&state=failed&queue=emails")

    with caplog.at_level("INFO", "apoq.dashboard"):
        writer.act(**confirmed(page))

    assert "Retried 2 tasks (failed, queue emails). (in the dashboard, from 203.0.113.7)" in caplog.text


def test_the_tasks_of_more_queues_than_are_listed_need_a_choice(engine, writer):
    with engine.begin() as connection:
        for number in range(25):
            Queue(f"q{number:02}").add(connection, "a")

    page = writer.get("/many?action=cancel&state=ready")
    writer.act(**confirmed(page))

    assert "Only those of the first 20 queues" in text_of(page)
    assert len(ids_in(engine, "state = 'cancelled'")) == 20


@pytest.mark.parametrize("name", ["queue", "type"])
def test_a_name_with_a_space_at_its_end_is_not_that_without(engine, writer, name):
    with engine.begin() as connection:
        for queue, type_ in (("orders", "pay"), ("orders ", "pay"), ("orders", "pay ")):
            Queue(queue).add(connection, type_)
        connection.exec_driver_sql("UPDATE apoq_tasks SET state = 'failed', failed_at = now()")
    given = {"queue": "queue=orders%20", "type": "queue=orders&type=pay%20"}[name]
    page = writer.get(f"/tasks?state=failed&{given}")
    link = re.search(r'href="\./(many\?[^"]*)"', page)
    assert link is not None

    said = writer.act(**confirmed(writer.get("/" + html.unescape(link[1]))))

    assert said.startswith("Retried 1 task (failed, queue orders")
    assert ids_in(engine, "state = 'pending'") == ids_in(engine, f"{name} LIKE '% '")


def test_spaces_around_a_typed_filter_are_ignored(engine, writer):
    fill(engine, "failed", 3)

    assert len(walk(writer, "/tasks?typed=1&type=%20a%20&key=&error=")) == 1
