"""Who may see the dashboard and change something by it, and what those who add tasks can do to viewers."""

from __future__ import annotations

import asyncio
import io
import itertools
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import probe
import pytest
import sqlalchemy as sa
from viewers import HOST, Viewer, text_of
from webtest import TestApp

import apoq.dashboard
from apoq import Queue
from apoq.dashboard.access import checked_role
from apoq.dashboard.actions import ACTIONS, BACK
from apoq.dashboard.dashboard import Dashboard
from apoq.dashboard.messages import FORM, MAX_BODY
from apoq.dashboard.pages import PAGES
from apoq.dashboard.site import Site

SCRIPT = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}&#106;"
"""Whatever a producer writes, no page contains it as HTML, or as a template."""

HOSTILE = """
    INSERT INTO apoq_tasks (queue, type, state, data, meta, error, unique_key, held_unique_key, key, schedule,
                            waiting_for, failed_at, completed_at, cancelled_at, claimed_at)
    SELECT :x, :x, state, to_jsonb(CAST(:x AS text)), jsonb_build_object(:x, :x),
           jsonb_build_object('class', CAST(:x AS text), 'message', CAST(:x AS text), 'traceback',
                              'File "' || :x || '", line 1, in ' || :x, 'retry_limit', CAST(:x AS text)),
           :x, CASE state WHEN 'pending' THEN CAST(:x AS text) END, :x, :x, :x, now(), now(),
           CASE state WHEN 'cancelled' THEN now() END, now()
    FROM unnest(ARRAY['pending', 'waiting', 'running', 'completed', 'failed', 'cancelled']) AS state;
    INSERT INTO apoq_claims
    SELECT gen_random_uuid(), 1, array_agg(id) FROM apoq_tasks WHERE state = 'running';
    INSERT INTO apoq_workers (id, host, pid, version, queues, concurrency, expires_at, grace)
    VALUES (gen_random_uuid(), :x, 1, :x, ARRAY[:x], 1, now() + interval '1 day', interval '1 day');
    INSERT INTO apoq_schedules (queue, name, type, cron, timezone, next_at, last_task_id)
    SELECT :x, :x, :x, :x, :x, now(), min(id) FROM apoq_tasks;
    INSERT INTO apoq_progress SELECT id, 1, 1, 2, :x, now() FROM apoq_tasks;
    UPDATE apoq_tasks SET result = to_jsonb(CAST(:x AS text));
    INSERT INTO apoq_pauses VALUES (:x, '', now(), :x, :x, now() + interval '1 day'),
                                   (:x, :x, now(), :x, :x, NULL);
    UPDATE apoq_tasks SET slot = 1, pool_key = :x, pool_slot = 1, worker_id = (SELECT id FROM apoq_workers)
    WHERE state = 'running';
    INSERT INTO apoq_tasks (queue, type, state, pool_key, key, waiting_for, waiting_since)
    SELECT :x, :x, 'waiting', CASE kind WHEN 'pool' THEN CAST(:x AS text) END, :x, kind, now()
    FROM unnest(ARRAY['key', 'pool']) AS kind;
    INSERT INTO apoq_limits (queue, type, key, at_most, declared, is_of_key, is_strict, holds, changed_at,
                             changed_by)
    SELECT :x, type, key, 0, 2, true, true, true, now(), :x
    FROM (VALUES ('', ''), (:x, ''), ('', :x), (:x || '2', '')) AS its (type, key);
    INSERT INTO apoq_links (parent_id, child_id, error)
    SELECT parent.id, child.id, jsonb_build_object('message', CAST(:x AS text))
    FROM apoq_tasks AS parent, apoq_tasks AS child WHERE parent.id < child.id;
    UPDATE apoq_tasks SET is_followed = true
"""

TABLES = ("apoq_tasks", "apoq_workers", "apoq_claims", "apoq_schedules", "apoq_pauses", "apoq_limits")


@pytest.fixture
def site(engine) -> Iterator[Site]:
    site = Site(engine, schema=None, redact=None, environment=SCRIPT, secret=None)
    yield site
    site.close()


@pytest.fixture
def writer(site) -> Viewer:
    return Viewer(Dashboard(site), "write")


@pytest.fixture
def task_id(engine) -> int:
    with engine.begin() as connection:
        return Queue().add(connection, "a").id


def state_of_everything(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return [
            connection.exec_driver_sql(
                f"SELECT coalesce(md5(string_agg(t::text, ',' ORDER BY t::text)), '') FROM {table} AS t"
            ).scalar_one()
            for table in TABLES
        ]


def asked(app: Any, path: str = "/", *, client: str = "127.0.0.1", **options: Any) -> httpx.Response:
    """Ask an ASGI application from this address."""
    method = options.pop("method", "GET")
    base_url = options.pop("base_url", "http://localhost")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(client, 5000))
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as browser:
            return await browser.request(method, path, **options)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("client", "headers", "base_url", "status"),
    [
        ("127.0.0.1", {}, "http://localhost:8080", 200),
        ("::1", {}, "http://[::1]:8080", 200),
        ("203.0.113.7", {}, "http://localhost", 403),
        ("127.0.0.1", {"X-Forwarded-For": "203.0.113.7"}, "http://localhost", 403),
        ("127.0.0.1", {"Forwarded": "for=203.0.113.7"}, "http://localhost", 403),
        ("127.0.0.1", {}, "http://rebound.example", 403),
    ],
)
@pytest.mark.parametrize("face", ["app", "wsgi"])
def test_without_authorize_only_a_browser_on_this_machine_may_read(
    engine, face, client, headers, base_url, status
):
    app = getattr(apoq.dashboard, face)(engine)
    if face == "app":
        found, page = (
            (response := asked(app, client=client, headers=headers, base_url=base_url)),
            response.text,
        )
        got = found.status_code
    else:
        host = base_url.removeprefix("http://")
        environ = {"REMOTE_ADDR": client, "HTTP_HOST": host, "SERVER_PROTOCOL": "HTTP/1.1"}
        answered = TestApp(app, environ).get("/", headers=headers, expect_errors=True)
        got, page = answered.status_int, answered.text
    app.close()

    assert got == status
    assert 'method="post"' not in page


def test_a_proxy_that_speaks_http_1_0_is_not_a_browser_on_this_machine(engine):
    """So does nginx, which adds no header by itself."""
    asgi, wsgi = apoq.dashboard.app(engine), apoq.dashboard.wsgi(engine)

    async def old(scope, receive, send):
        await asgi({**scope, "http_version": "1.0"}, receive, send)

    environ = {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1:8000", "SERVER_PROTOCOL": "HTTP/1.0"}
    statuses = [
        asked(old, base_url="http://127.0.0.1:8000").status_code,
        TestApp(wsgi, environ).get("/", expect_errors=True).status_int,
    ]
    asgi.close()
    wsgi.close()

    assert statuses == [403, 403]


def raises(_request: object) -> None:
    raise RuntimeError("the session store is away")


@pytest.mark.parametrize("given", [None, True, 1, "admin", "WRITE", "", object(), ["write"], {"write": 1}])
def test_any_other_value_of_authorize_is_no_access(given, caplog):
    assert checked_role(given) is None
    assert ("access is denied" in caplog.text) == (given is not None)


@pytest.mark.parametrize("face", ["app", "wsgi"])
def test_an_authorize_that_raises_is_no_access(engine, face, caplog):
    app = getattr(apoq.dashboard, face)(engine, authorize=raises)
    status = asked(app).status_code if face == "app" else TestApp(app).get("/", status="*").status_int
    app.close()

    assert status == 403
    assert "the session store is away" in caplog.text


def test_authorize_may_be_a_coroutine_function(engine):
    async def authorize(request):
        await asyncio.sleep(0)
        return request.headers.get("x-role")

    app = apoq.dashboard.app(engine, authorize=authorize)

    statuses = [asked(app, headers=headers).status_code for headers in ({}, {"X-Role": "read"})]
    app.close()

    assert statuses == [403, 200]


@pytest.mark.parametrize("face", ["app", "wsgi"])
@pytest.mark.parametrize("bad", [{"authorize": "write"}, {"redact": 7}])
def test_bad_arguments_are_refused_at_once(engine, face, bad):
    with pytest.raises(TypeError, match="must be a function"):
        getattr(apoq.dashboard, face)(engine, **bad)


@pytest.mark.parametrize(
    ("secret", "error", "message"),
    [
        ("", ValueError, "secret must not be empty, got ''; omit it"),
        (b"", ValueError, "secret must not be empty, got b''; omit it"),
        (123, TypeError, "secret must be a text or bytes, got int"),
    ],
)
@pytest.mark.parametrize("face", ["app", "wsgi"])
def test_an_invalid_secret_is_refused(engine, face, secret, error, message):
    with pytest.raises(error, match=message):
        getattr(apoq.dashboard, face)(engine, secret=secret)


def test_something_else_than_an_engine_is_refused():
    with pytest.raises(TypeError, match="engine must be a SQLAlchemy engine, got 'postgresql://x'"):
        apoq.dashboard.app("postgresql://x")  # type: ignore[arg-type]


def test_every_response_has_strict_headers(site):
    paths = [*PAGES, "/nothing", "/static/style.css", "/tasks/7", "/actions"]

    for path, role in itertools.product(paths, [None, "read", "write"]):
        headers = dict(Viewer(Dashboard(site), role).ask("GET", path).all_headers())

        policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert ("no-store" in headers["cache-control"]) == (not path.startswith("/static/"))
        assert not any(name.startswith("access-control") for name in headers)


def test_cookies_are_hidden_from_scripts_and_other_sites(writer):
    cookies = [value for name, value in writer.ask("GET", "/").headers if name == "set-cookie"]

    assert [sorted(each.split("; ")[1:]) for each in cookies] == [["HttpOnly", "Path=/", "SameSite=Lax"]]


def test_no_page_has_inline_code_or_style(engine, site, writer, task_id):
    site.environment = None
    pages = [writer.ask("GET", f"{path}?state=failed&action=retry").body.decode() for path in PAGES]
    pages.append(writer.get(f"/tasks/{task_id}"))

    for page in pages:
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?! defer src=)|javascript:", page)


def test_what_producers_write_is_never_html(engine, writer):
    with engine.begin() as connection:
        for statement in HOSTILE.split(";"):
            connection.execute(sa.text(statement), {"x": SCRIPT} if ":x" in statement else {})
        ids = list(connection.scalars(sa.text("SELECT id FROM apoq_tasks")))
    x = quote(SCRIPT)
    addresses = [f"{path}?{urlencode({'name': SCRIPT, 'queue': SCRIPT})}" for path in PAGES]
    addresses += [f"/tasks?{name}={x}" for name in ("state", "queue", "type", "key", "error", "after")]
    addresses += [f"/tasks?state={state}" for state in ("ready", "waiting", "running", "failed", "cancelled")]
    addresses += [f"/tasks/{task_id}" for task_id in ids]
    addresses += [f"/many?action=retry&state=failed&type={x}&queue={x}&error={x}&key={x}", f"/{x}"]
    addresses += ["/keys", "/keys?waiting=1", f"/keys?name={x}", f"/keys?queue={x}"]
    addresses += [f"/keys?after_{name}={x}" for name in ("queue", "kind", "name", "limit_queue", "limit_key")]
    addresses += [f"/limit?queue={x}&name={x}&of={of}&back={x}" for of in ("key", "type", "queue")]
    addresses += [f"/limit?queue={x}&name={x}&of={of}&at_most=0" for of in ("key", "type", "queue")]

    pages = {address: writer.ask("GET", address).body.decode() for address in addresses}

    for address, page in pages.items():
        assert "<script>alert" not in page, address
        assert "<img" not in page, address
        assert "{{7*7}}" not in page or "&lt;script&gt;" in page, address
        assert not re.search(r"""=["'][^"']*["'][^\s>/]""", page), f"an attribute ends early: {address}"
    assert sum("&lt;script&gt;" in page for page in pages.values()) > len(addresses) / 2


def test_messages_about_hostile_names_are_escaped(engine, writer):
    said = writer.act("pause", queue=SCRIPT)

    assert said == f"Paused the queue {SCRIPT}. Running tasks continue."


FORMS = {
    "retry": {"id": 1},
    "cancel": {"id": 1},
    "retry-many": {"state": "failed", "until": "2100-01-01T00:00:00+00:00", "at_most": 10},
    "cancel-many": {"state": "ready", "until": "2100-01-01T00:00:00+00:00", "at_most": 10},
    "pause": {"queue": "default"},
    "resume": {"queue": "default"},
    "limit": {"queue": "default", "of": "queue", "at_most": 5},
    "remove-limit": {"queue": "default", "of": "queue", "confirmed": "yes"},
    "run-schedule": {"queue": "default", "schedule": "s"},
    "pause-schedule": {"queue": "default", "schedule": "s"},
    "resume-schedule": {"queue": "default", "schedule": "s"},
}


def test_no_request_of_a_reader_changes_anything(engine, site, writer, task_id):
    with engine.begin() as connection:
        Queue().schedule(connection, "s", "a", every=timedelta(days=1))
    token = writer.token()
    assert FORMS.keys() == ACTIONS.keys()
    before = state_of_everything(engine)
    reader = Viewer(Dashboard(site))
    reader.cookies = dict(writer.cookies)  # even with the session of a writer

    statuses = {
        reader.post({"action": action, "token": token, **form}).status for action, form in FORMS.items()
    }
    for path in [*PAGES, f"/tasks/{task_id}"]:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            reader.ask(method, f"{path}?state=ready&action=cancel")

    assert statuses == {403}
    assert state_of_everything(engine) == before


OUTSIDE = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "none"},
    {"sec-fetch-site": "cross-site", "origin": f"https://{HOST}"},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": f"https://{HOST}.evil.example"},
    {},
]


def test_a_form_from_another_site_is_refused(engine, writer, task_id):
    form = {"action": "cancel", "id": task_id, "token": writer.token()}
    before = state_of_everything(engine)

    for headers in OUTSIDE:
        response = writer.post(form, {"content-type": FORM, **headers})

        assert response.status == 403, headers
        assert "Nothing was changed" in text_of(response)
    assert state_of_everything(engine) == before


@pytest.mark.parametrize(
    "headers", [{"sec-fetch-site": "same-origin"}, {"origin": f"https://{HOST}"}], ids=str
)
def test_a_form_from_here_is_accepted(engine, writer, task_id, headers):
    form = {"action": "cancel", "id": task_id, "token": writer.token()}

    assert writer.post(form, {"content-type": FORM, **headers}).status == 303


@pytest.mark.parametrize("other", ['prefs={"a":1}', "flag", "n=a b", "=", 'q="'])
def test_a_form_is_accepted_beside_any_cookie_of_the_application(engine, writer, task_id, other):
    form = {"action": "cancel", "id": task_id, "token": writer.token()}
    headers = {
        "content-type": FORM,
        "sec-fetch-site": "same-origin",
        "cookie": f"{other}; apoq_session={writer.cookies['apoq_session']}; {other}",
    }

    assert writer.post(form, headers).status == 303


def test_a_form_without_the_token_of_its_session_is_refused(engine, writer, task_id):
    before, _ = state_of_everything(engine), writer.token()

    for token in ("", "x", "é", "0" * 64, None):
        form = {"action": "cancel", "id": task_id} | ({} if token is None else {"token": token})
        assert writer.post(form).status == 403
    assert state_of_everything(engine) == before


def test_the_token_of_another_session_is_refused(engine, site, writer, task_id):
    other = Viewer(Dashboard(site), "write")
    form = {"action": "cancel", "id": task_id, "token": other.token()}
    writer.token()

    assert writer.post(form).status == 403
    writer.cookies = {"apoq_session": "chosen-by-an-attacker"}
    assert writer.post(form).status == 403


def test_the_token_is_valid_in_each_process_of_the_application(engine, writer, task_id):
    site = Site(engine, schema=None, redact=None, environment=None, secret=None)
    form = {"action": "cancel", "id": task_id, "token": writer.token()}
    writer.dashboard = Dashboard(site)

    assert writer.post(form).status == 303
    site.close()


MANY = FORMS["cancel-many"]
INVALID = [
    ({"action": "drop"}, 400),
    ({"action": "cancel"}, 400),
    ({"action": "cancel", "id": "7; DROP TABLE apoq_tasks"}, 400),
    ({"action": "cancel", "id": 10**18 * 9 + 10**18}, 400),
    ({"action": "cancel-many"}, 400),
    ({"action": "cancel-many", **MANY, "at_most": 10_001}, 400),
    ({"action": "cancel-many", **MANY, "at_most": "-1"}, 400),
    ({"action": "cancel-many", **MANY, "until": "soon"}, 400),
    ({"action": "cancel-many", **MANY, "until": "9999-12-31T23:59:59-23:00"}, 400),
    ({"action": "cancel-many", **MANY, "state": ""}, 400),
    ({"action": "cancel-many", **MANY, "state": "completed"}, 400),
    ({"action": "retry-many", **MANY}, 400),
    ({"action": "pause"}, 400),
    ({"action": "pause", "queue": "q", "length": "5y"}, 400),
    ({"action": "pause", "queue": "q", "reason": "x" * 100_000}, 413),
    ({"action": "run-schedule", "queue": "q"}, 400),
]


def test_an_invalid_form_is_refused_with_a_message(engine, writer):
    before, token = state_of_everything(engine), writer.token()

    assert [writer.post({**form, "token": token}).status for form, _ in INVALID] == [
        status for _, status in INVALID
    ]
    assert state_of_everything(engine) == before


def test_other_content_than_a_form_is_refused(engine, writer, task_id):
    token = writer.token()
    body = f'{{"action": "cancel", "id": {task_id}, "token": "{token}"}}'.encode()
    headers = {"content-type": "application/json", "sec-fetch-site": "same-origin"}

    assert writer.ask("POST", "/actions", body, headers).status == 415


@pytest.mark.parametrize(
    "back",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "tasks?a=\r\nx: y",
        "..",
    ],
)
def test_an_action_never_leads_to_another_site(engine, writer, back):
    response = writer.post({"action": "pause", "queue": "q", "token": writer.token(), "back": back})

    assert dict(response.headers)["location"] == "./"


@pytest.mark.parametrize("back", ["tasks", "tasks/7", "tasks?state=failed&queue=a%2Fb", "queue?name=x", ""])
def test_it_returns_to_a_page_of_the_dashboard(back):
    assert BACK.fullmatch(back)


def test_a_message_of_somebody_else_is_not_shown(writer):
    writer.cookies["apoq_notice"] = "WW91IHdvbg==.0000"

    assert "You won" not in writer.get("/")


def test_a_form_that_is_cut_off_is_not_read():
    """Without its last fields, it could mean something else."""
    form = b"queue=default&type=mails"

    async def receive():
        return next(messages)

    messages = iter(
        [{"type": "http.request", "body": form[:-11], "more_body": True}, {"type": "http.disconnect"}]
    )
    environ = {"CONTENT_LENGTH": str(len(form)), "wsgi.input": io.BytesIO(form[:-11])}

    assert asyncio.run(probe.asgi_body(receive)) is None
    assert probe.wsgi_body(environ) == b""


def test_a_body_is_read_up_to_a_bound(engine):
    app = apoq.dashboard.app(engine, authorize=lambda _: "write")
    headers = {"sec-fetch-site": "same-origin", "content-type": FORM}

    response = asked(app, "/actions", method="POST", content=b"a" * (50 * MAX_BODY), headers=headers)
    app.close()

    assert response.status_code == 413


def test_a_problem_page_says_nothing_of_the_database(engine, writer, task_id, caplog, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("postgresql://user:hunter2@db/app")

    monkeypatch.setitem(PAGES, "/", fail)  # type: ignore[arg-type]

    response = writer.ask("GET", "/")

    assert response.status == 500
    assert "hunter2" not in response.body.decode()
    assert "hunter2" in caplog.text


PASSWORDS = Queue("passwords")


@PASSWORDS.task(type="reset", unique=True)
def reset(password: str, user_id: int) -> None: ...


@pytest.mark.parametrize(
    ("password", "redact", "shown"),
    [
        ("hunter2", None, 'reset:{"password":"[hidden]","user_id":7}'),
        ("hunter2" * 100, None, "reset:[hidden]"),
        ("hunter2", lambda _type, data: data, "reset:[hidden]"),
    ],
    ids=["short", "shortened", "redact"],
)
def test_arguments_in_unique_keys_are_hidden_like_the_data(engine, password, redact, shown):
    with engine.begin() as connection:
        task = reset.add(connection, password=password, user_id=7)
    site = Site(engine, schema=None, redact=redact, environment=None, secret=None)

    pages = [Viewer(Dashboard(site)).get(address) for address in ("/tasks", f"/tasks/{task.id}")]
    site.close()

    for page in pages:
        assert shown in text_of(page)
        assert "reset:{" not in text_of(page).replace(shown, "")
