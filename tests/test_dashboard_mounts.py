"""The dashboard in each framework, as dashboard.md says, and behind proxies."""

from __future__ import annotations

import asyncio
import html
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urljoin, urlsplit

import flask
import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Request
from pages import DOCS, blocks
from pyramid.config import Configurator
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.routing import Mount
from webtest import TestApp

import apoq.dashboard
from apoq import Queue
from apoq.dashboard.site import Site

Get = Callable[[str], tuple[int, str]]
START = "https://queue.example/apoq/"
MOST = 30
"""About how many pages are looked at."""
SAME_SITE = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def task_id(engine) -> int:
    with engine.begin() as connection:
        for number in range(30):
            Queue(f"a/b {number % 2}").add(connection, "a", retry_limit=3, unique_key=f"k{number}")
        return Queue("emails").add(connection, "a").id


def links(page: str) -> set[str]:
    return {html.unescape(each) for each in re.findall(r'(?:href|src|action)="([^"]*)"', page)}


def crawl(get: Get, start: str = START) -> int:
    """Follow the links, which must lead to a page below the start. Return how many pages there were."""
    waiting, seen, pages = {start}, set(), 0
    while waiting:
        address = waiting.pop()
        seen.add(address)
        status, page = get(address)
        pages += 1
        assert status == 200, (address, page[:500])
        for link in links(page) if page.startswith("<!doctype") else ():
            to = urljoin(address, link)
            assert to.startswith(start), f"{address} has a link to {link}"
            if not to.endswith("/actions") and to not in seen and len(seen) < MOST:
                waiting.add(to)
    return pages


class ASGIBrowser:
    """A browser that keeps its cookies, for an ASGI application."""

    def __init__(self, app: Any, strip: str = "") -> None:
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://queue.example")
        self._strip = strip

    def ask(self, method: str, address: str, **options: Any) -> httpx.Response:
        parts = urlsplit(address)
        path = parts.path.removeprefix(self._strip) + (f"?{parts.query}" if parts.query else "")
        return asyncio.run(self._client.request(method, path, **options))

    def get(self, address: str) -> tuple[int, str]:
        response = self.ask("GET", address)
        return response.status_code, response.text


def form_of(page: str, task_id: int) -> dict[str, str]:
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', page))
    assert fields["id"] == str(task_id)
    return fields


def cancelled(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT id FROM apoq_tasks WHERE state = 'cancelled'")))


@pytest.fixture
def page(engine, run_page, monkeypatch) -> Iterator[dict[str, Any]]:
    """The names that the page's code defines."""
    sites: list[Site] = []
    make = Site.__init__

    def noted(site: Site, *args: Any, **options: Any) -> None:
        sites.append(site)
        make(site, *args, **options)

    monkeypatch.setattr(Site, "__init__", noted)
    yield run_page("dashboard.md", engine=engine)
    for site in sites:
        site.close()


def test_in_fastapi(engine, page, task_id):
    app: FastAPI = page["app"]

    @app.get("/login")
    def login(request: Request, role: str) -> None:
        request.session["role"] = role

    browser = ASGIBrowser(app)

    refused, _ = browser.get(START)
    browser.get("/login?role=admin")
    crawled = crawl(browser.get)
    _, shown = browser.get(f"{START}tasks/{task_id}")
    sent = browser.ask("POST", f"{START}actions", data=form_of(shown, task_id), headers=SAME_SITE)
    after = urljoin(f"{START}actions", sent.headers["location"])

    assert refused == 403
    assert crawled > MOST / 2
    assert f"Cancelled task {task_id}." in browser.get(after)[1]
    assert cancelled(engine) == [task_id]


@pytest.mark.parametrize("is_async", [False, True])
def test_in_starlette_with_each_kind_of_engine(engine, url, task_id, is_async):
    given = create_async_engine(url) if is_async else engine
    dashboard = apoq.dashboard.app(given, authorize=lambda request: "write")
    browser = ASGIBrowser(Starlette(routes=[Mount("/apoq", dashboard)]))

    crawled = crawl(browser.get)
    _, shown = browser.get(f"{START}tasks/{task_id}")
    browser.ask("POST", f"{START}actions", data=form_of(shown, task_id), headers=SAME_SITE)
    dashboard.close()

    assert crawled > MOST / 2
    assert cancelled(engine) == [task_id]


def test_behind_a_proxy_that_removes_the_path(engine, task_id):
    dashboard = apoq.dashboard.app(engine, authorize=lambda request: "write")
    start = "https://queue.example/internal/queue/"
    browser = ASGIBrowser(dashboard, strip="/internal/queue")

    crawled = crawl(browser.get, start)
    dashboard.close()

    assert crawled > MOST / 2


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [("/apoq", "/apoq", "apoq/"), ("/x/apoq", "", "apoq/"), ("/x/apoq", "/", None)],
)
def test_a_missing_slash_is_added(engine, root, path, expected):
    dashboard = apoq.dashboard.app(engine, authorize=lambda request: "read")
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "root_path": root,
        "headers": [],
        "query_string": b"",
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(dashboard(scope, receive, send))
    dashboard.close()

    assert dict(sent[0]["headers"]).get(b"location") == (expected and expected.encode())


def test_static_files_are_kept_until_they_change(engine):
    dashboard = apoq.dashboard.app(engine, authorize=lambda request: "read")
    browser = ASGIBrowser(dashboard)
    _, shown = browser.get("/")

    styles = next(link for link in links(shown) if "style.css" in link)
    response = browser.ask("GET", urljoin("/", styles))
    dashboard.close()

    assert re.search(r"\?v=[0-9a-f]{12}$", styles)
    assert "immutable" in response.headers["cache-control"]


def test_in_flask(engine, page, task_id):
    app: flask.Flask = page["flask_app"]
    app.add_url_rule("/login", view_func=lambda: flask.session.update(is_admin=True) or "")
    browser = TestApp(app, {"HTTP_HOST": "queue.example"})

    refused = browser.get("/apoq/", status="*").status_int
    browser.get("/login")
    crawled = crawl(lambda address: _webtest(browser, address))
    sent = browser.get(f"/apoq/tasks/{task_id}").forms[0].submit(headers=SAME_SITE)

    assert refused == 403
    assert crawled > MOST / 2
    assert sent.status_int == 303
    assert f"Cancelled task {task_id}." in sent.follow().text
    assert cancelled(engine) == [task_id]


def _webtest(browser: TestApp, address: str) -> tuple[int, str]:
    parts = urlsplit(address)
    found = browser.get(parts.path + (f"?{parts.query}" if parts.query else ""), status="*")
    return found.status_int, found.text


class Admins:
    """A security policy that knows users by a header."""

    def identity(self, request: Any) -> Any:
        return request.headers.get("X-User")

    def permits(self, request: Any, context: Any, permission: str) -> bool:
        return permission == "admin" and self.identity(request) == "ada"


def test_in_pyramid(engine, page, task_id):
    config = Configurator()
    config.set_security_policy(Admins())
    config.include(page["includeme"])
    browser = TestApp(config.make_wsgi_app(), {"HTTP_HOST": "queue.example"})

    refused = browser.get("/apoq/", status="*").status_int
    browser.extra_environ["HTTP_X_USER"] = "ada"
    crawled = crawl(lambda address: _webtest(browser, address))
    sent = browser.get(f"/apoq/tasks/{task_id}").forms[0].submit(headers=SAME_SITE)

    assert refused == 403
    assert crawled > MOST / 2
    assert f"Cancelled task {task_id}." in sent.follow().text


DJANGO = """
import re, sys
from urllib.parse import urljoin
from django.conf import settings
settings.configure(
    DEBUG=True, SECRET_KEY="x", ROOT_URLCONF="urls", ALLOWED_HOSTS=["*"],
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions",
                    "django.contrib.messages", "django.contrib.admin"],
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware",
                "django.middleware.csrf.CsrfViewMiddleware",
                "django.contrib.auth.middleware.AuthenticationMiddleware"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
)
import django
django.setup()
import sqlalchemy as sa
from types import ModuleType
from django.contrib import admin
from django.core.management import call_command
from django.urls import path, re_path
call_command("migrate", "auth", verbosity=0)
module = ModuleType("urls")
vars(module).update(engine=sa.create_engine(sys.argv[1]), re_path=re_path)
exec(sys.argv[2] + "\\n" + sys.argv[3], vars(module))
module.urlpatterns.append(path("admin/", admin.site.urls))
sys.modules["urls"] = module
from django.contrib.auth.models import User
from django.test import Client
browser = Client(enforce_csrf_checks=True)
print(browser.get("/apoq/").status_code, browser.get("/apoq").status_code)
browser.force_login(User.objects.create_superuser("ada", "ada@example.org", "x"))
print(browser.get("/apoq")["Location"], browser.get("/apoq/tasks").status_code)
page = browser.get("/apoq/tasks/" + sys.argv[4]).content.decode()
form = dict(re.findall(r'<input type="hidden" name="(\\w+)" value="([^"]*)"', page))
sent = browser.generic(
    "POST", "/apoq/actions", "&".join(f"{name}={value}" for name, value in form.items()),
    "application/x-www-form-urlencoded", headers={"sec-fetch-site": "same-origin"})
print(sent.status_code, sent["Location"], sent["X-Frame-Options"])
print("Cancelled task" in browser.get(urljoin("/apoq/actions", sent["Location"])).content.decode())
"""


@pytest.mark.slow
def test_in_django(engine, task_id):
    code = next(
        block.code for block in blocks(DOCS / "dashboard.md", "python") if "HttpResponse" in block.code
    )
    urls = next(block.code for block in blocks(DOCS / "dashboard.md", "py") if "urlpatterns" in block.code)
    url = engine.url.render_as_string(hide_password=False)

    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DJANGO, url, code, urls, str(task_id)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert said.stderr == ""
    assert said.stdout.split() == ["302", "302", "apoq/", "200", "303", f"tasks/{task_id}", "DENY", "True"]
    assert cancelled(engine) == [task_id]
