"""The page of keys and limits, and the changes of limits by it."""

from __future__ import annotations

import html
import re
import threading
from urllib.parse import urljoin

import pytest
import sqlalchemy as sa
from viewers import Viewer, next_page, text_of
from waiting import patience

from apoq import Limit, Queue
from apoq.dashboard.keys import KEYS, LIMITS

until = patience(20.0)

DASH = "\N{EN DASH}"
EMAILS = Queue("emails")

USED = """
    INSERT INTO apoq_tasks (queue, type, state, key, slot, pool_key, pool_slot, waiting_for, waiting_since,
                            claimed_at)
    SELECT CASE n % 2 WHEN 0 THEN 'emails' ELSE 'reports' END, 'send', state,
           CASE of WHEN 'key' THEN 'tenant ' || n END, CASE of WHEN 'key' THEN 1 END,
           CASE of WHEN 'pool' THEN 'type ' || n END, CASE of WHEN 'pool' THEN 1 END,
           CASE state WHEN 'waiting' THEN of END, now(), now()
    FROM generate_series(1, CAST(:count AS int)) AS n,
         unnest(ARRAY['waiting', 'running']) AS state, unnest(ARRAY['key', 'pool']) AS of
    WHERE state = 'running' OR n % 3 = 0
"""
"""Keys and pools of which a task runs; of each third, a task waits as well."""


def names(page: str) -> list[str]:
    """Return the keys, types and queues, or the limits, of the tables of a page."""
    return [text_of(each) for each in re.findall(r'<th role="rowheader" scope="row">(.*?)</th>', page)]


def walk(viewer: Viewer, address: str) -> list[str]:
    """Return the keys of all pages."""
    found: list[str] = []
    following: str | None = address
    while following is not None:
        page = viewer.get(following)
        found += names(page)
        following = next_page(page)
    return found


def limits(engine: sa.Engine) -> list[tuple[str | None, str | None, int | None]]:
    with engine.connect() as connection:
        return [(each.type, each.key, each.at_most) for each in EMAILS.limits(connection)]


def question(viewer: Viewer, action: str, **form: object) -> str:
    """Ask for a change, and return the page that asks whether it is meant."""
    response = viewer.post({"action": action, "token": viewer.token(), "back": "keys", **form})
    assert response.status == 303
    return viewer.get(urljoin("/actions", dict(response.headers)["location"]))


def confirmed(page: str) -> dict[str, str]:
    """Return the fields of the form with which a question is confirmed."""
    fields = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page)
    return {name: html.unescape(value) for name, value in fields}


def test_a_full_key_is_shown_with_the_task_that_holds_it_and_those_that_wait(engine, make_worker, reader):
    may_end = threading.Event()
    worker = make_worker(EMAILS)
    worker.use("send", lambda task: may_end.wait(20), limit=Limit(1, key=True))
    with engine.begin() as connection:
        EMAILS.add_many(connection, "send", [{"n": n} for n in range(3)], key="tenant-7")
    worker.start()

    def blocked() -> bool:
        with engine.connect() as connection:
            states = "SELECT count(*) FILTER (WHERE state = 'waiting') FROM apoq_tasks"
            return connection.exec_driver_sql(states).scalar_one() == 2

    try:
        until(blocked)
        page = reader.get("/keys")
    finally:
        may_end.set()

    with engine.connect() as connection:
        first = connection.exec_driver_sql("SELECT min(id) FROM apoq_tasks").scalar_one()
    assert re.search(
        rf"tenant-7 emails full 1 of 1 task {first} on \S+ \d+ for \d+ s 2 for \d+ s", text_of(page)
    )
    assert f'href="./tasks/{first}"' in page
    assert "each key of send emails 1 1 as due" in text_of(page)


def test_a_key_that_a_failed_task_holds_up_leads_to_that_task(engine, make_worker, reader):
    def fail(task: object) -> None:
        raise ValueError

    worker = make_worker(EMAILS)
    strict = Limit(1, key=True, order="strict", after_failure="hold")
    worker.use("book", fail, retry_limit=0, limit=strict)
    with engine.begin() as connection:
        tasks = [EMAILS.add(connection, "book", key="account-7") for _ in range(2)]
    worker.start()

    def is_held() -> bool:
        reader.dashboard.site.snapshots.forget()
        return 'class="state held"' in reader.get("/keys")

    until(is_held)
    page = reader.get("/keys")

    assert f"account-7 emails held 0 of 1 failed task {tasks[0].id} 1 for" in text_of(page)
    assert "each key of book emails 1 1 strict, held after a failure" in text_of(page)


@pytest.mark.parametrize("queue", ["", "emails", "reports"])
@pytest.mark.parametrize("waiting", ["", "1"])
def test_the_pages_have_each_key_and_pool_once(engine, reader, queue, waiting):
    with engine.begin() as connection:
        connection.execute(sa.text(USED), {"count": 6 * KEYS})

    found = walk(reader, f"/keys?queue={queue}&waiting={waiting}")

    numbers = [
        n
        for n in range(1, 6 * KEYS + 1)
        if (not waiting or n % 3 == 0) and queue in {"", "reports" if n % 2 else "emails"}
    ]
    assert len(found) > KEYS
    assert sorted(found) == sorted([*(f"tenant {n}" for n in numbers), *(f"type type {n}" for n in numbers)])


def test_a_key_and_a_type_are_found_by_their_names(engine, reader):
    with engine.begin() as connection:
        connection.execute(sa.text(USED), {"count": 40})
        EMAILS.limit(connection, 3, key="tenant 30")

    assert "tenant 30 emails free 1 of 3" in text_of(reader.get("/keys?name=tenant+30"))
    assert names(reader.get("/keys?name=tenant+30&queue=reports")) == []
    assert names(reader.get("/keys?name=type+31&queue=reports")) == ["type type 31"]
    assert "No task with this key" in reader.get("/keys?name=nothing")


def test_the_counts_of_a_key_stop_at_a_bound(engine, reader):
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO apoq_tasks (queue, type, state, key, waiting_for, waiting_since) "
            "SELECT 'emails', 'a', 'waiting', 'k' || mod(n, 10), 'key', now() - interval '3 hours' "
            "FROM generate_series(1, 3000) AS n"
        )

    assert f"k0 emails {DASH} 0 {DASH} 100+ for 3 h" in text_of(reader.get("/keys"))
    assert f"k0 emails {DASH} 0 {DASH} 300 for 3 h" in text_of(reader.get("/keys?name=k0"))


def test_limits_are_shown_as_the_code_says_and_as_they_were_changed(engine, make_worker, reader):
    worker = make_worker(EMAILS)
    worker.use("send", lambda task: None, limit=Limit(2))
    worker.start()
    until(lambda: limits(engine))
    with engine.begin() as connection:
        EMAILS.limit(connection, 9, type="send")
        EMAILS.limit(connection, 0, key="tenant-7")
        Queue("reports").limit(connection, 4)
        user = connection.exec_driver_sql("SELECT session_user").scalar_one()

    said = text_of(reader.get("/keys"))

    assert f"key tenant-7 emails paused 0 {DASH} as due by {user}, 0 s ago" in said
    assert f"type send emails 9 2 as due by {user}" in said
    assert f"whole queue reports 4 {DASH} as due by {user}" in said


def test_the_pages_of_limits_have_each_once(engine, reader):
    with engine.begin() as connection:
        for number in range(2 * LIMITS + 5):
            EMAILS.limit(connection, 1, key=f"k{number:03}")

    found, following = [], "/keys"
    while following:
        page = reader.get(following)
        found += names(page)
        more = re.search(r'href="\.(/keys[^"]*after_limit_key[^"]*)">More limits', page)
        following = html.unescape(more[1]) if more else ""

    assert found == [f"key k{number:03}" for number in range(2 * LIMITS + 5)]


@pytest.mark.parametrize(
    ("of", "name", "limit"),
    [("key", "k", (None, "k", 5)), ("type", "t", ("t", None, 5)), ("queue", "ignored", (None, None, 5))],
)
def test_a_limit_is_set_and_removed(engine, writer, of, name, limit):
    its = {"queue": "emails", "of": of, "name": name}
    subject = {"key": "the key k of ", "type": "the type t of "}.get(of, "") + "the queue emails"

    said = writer.act("limit", at_most=5, **its)
    assert limits(engine) == [limit]
    page = question(writer, "remove-limit", **its)
    assert limits(engine) == [limit]
    told = writer.act("remove-limit", **{**its, "confirmed": "yes"})

    assert limits(engine) == []
    assert said == f"Limited {subject} to 5."
    assert f"Remove the limit that was set for {subject}?" in text_of(page)
    assert told == f"Removed the limit that was set for {subject}."


def test_a_limit_of_zero_is_set_only_after_a_question(engine, writer):
    with engine.begin() as connection:
        connection.execute(sa.text(USED), {"count": 6})
    its = {"queue": "emails", "of": "key", "name": "tenant 6"}

    page = question(writer, "limit", at_most=0, **its)

    assert limits(engine) == []
    assert "Let no task of the key tenant 6 of the queue emails begin?" in text_of(page)
    assert "Running 1 Waiting 1" in text_of(page)
    fields = confirmed(page)
    assert fields["back"] == "keys"
    assert writer.act(
        "limit", **{name: fields[name] for name in fields if name not in {"action", "token"}}
    ) == ("Limited the key tenant 6 of the queue emails to 0.")
    assert limits(engine) == [(None, "tenant 6", 0)]


def test_the_question_says_what_the_code_declares(engine, make_worker, writer):
    worker = make_worker(EMAILS)
    worker.use("send", lambda task: None, limit=Limit(2))
    worker.start()
    until(lambda: limits(engine))
    with engine.begin() as connection:
        EMAILS.limit(connection, 9, type="send")

    page = question(writer, "remove-limit", queue="emails", of="type", name="send")

    assert "At most now 9 In the code 2" in text_of(page)
    assert "Then at most 2 run at once, as the code says." in text_of(page)


@pytest.mark.parametrize(
    "form",
    [
        {"at_most": "x"},
        {"at_most": "-1"},
        {"at_most": "10001"},
        {"at_most": ""},
        {"at_most": "1001", "of": "key", "name": "k"},
        {"at_most": "5", "of": "key", "name": ""},
        {"at_most": "5", "of": "key", "name": "k" * 300},
        {"at_most": "5", "of": "nothing"},
        {"at_most": "5", "queue": ""},
    ],
    ids=str,
)
def test_an_invalid_limit_is_refused_with_a_message(engine, writer, form):
    given = {"action": "limit", "queue": "emails", "of": "queue", "token": writer.token(), **form}

    response = writer.post(given)

    assert response.status == 400
    assert "must be" in text_of(response) or "must have" in text_of(response) or "choose" in text_of(response)
    assert limits(engine) == []


def test_a_question_about_nothing_is_not_found(writer):
    for query in ("", "?queue=emails", "?queue=emails&of=key", "?queue=emails&of=queue&at_most=7"):
        assert writer.ask("GET", f"/limit{query}").status == 404


def test_a_reader_sees_keys_and_limits_but_no_form(engine, reader):
    with engine.begin() as connection:
        connection.execute(sa.text(USED), {"count": 3})
        EMAILS.limit(connection, 3, key="tenant 2")

    page = reader.get("/keys")

    assert "tenant 2 emails free 1 of 3" in text_of(page)
    assert 'method="post"' not in page
    assert reader.ask("GET", "/limit?queue=emails&of=queue&at_most=0").status == 403
