"""A viewer of the dashboard, who follows redirects and keeps cookies like a browser."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

from apoq.dashboard.dashboard import Dashboard
from apoq.dashboard.messages import FORM, Request, Response

HOST = "queue.example"


class Viewer:
    """Asks a dashboard directly, without a server."""

    def __init__(self, dashboard: Dashboard, role: str | None = "read") -> None:
        self.dashboard = dashboard
        self.role = role
        self.cookies: dict[str, str] = {}

    def ask(
        self, method: str, address: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Response:
        parts = urlsplit(urljoin("/", address))
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        request = Request(
            method,
            parts.path,
            "",
            dict(parse_qsl(parts.query, keep_blank_values=True)),
            {"host": HOST, "cookie": cookie, **(headers or {})},
            body,
            "203.0.113.7",
        )
        response = self.dashboard.respond(request, self.role)  # type: ignore[arg-type]
        for name, value in response.headers:
            if name == "set-cookie":
                key, _, content = value.partition(";")[0].partition("=")
                self.cookies[key] = content
        return response

    def get(self, address: str) -> str:
        response = self.ask("GET", address)
        assert response.status == 200, (response.status, text_of(response))
        return response.body.decode()

    def post(self, form: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Response:
        sent = {"content-type": FORM, "sec-fetch-site": "same-origin"} if headers is None else headers
        return self.ask("POST", "/actions", urlencode(form).encode(), sent)

    def token(self) -> str:
        """Return the token of this viewer's forms."""
        self.get("/tasks")
        return self.dashboard.site.tokens.token(self.cookies["apoq_session"])

    def act(self, action: str, **form: object) -> str:
        """Make a change, and return the message on the next page."""
        response = self.post({"action": action, "token": self.token(), "back": "workers", **form})
        assert response.status == 303, text_of(response)
        page = self.get(urljoin("/actions", dict(response.headers)["location"]))
        found = re.search(r'role="status">(.*?)</p>', page)
        assert found is not None, page
        return html.unescape(found[1])


def text_of(response: Response | str) -> str:
    """Return the words of a page."""
    page = response if isinstance(response, str) else response.body.decode()
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def listed(page: str) -> list[int]:
    """Return the ids of the tasks in a list, in order."""
    return [int(each) for each in re.findall(r'href="\./tasks/(-?\d+)"><span class="id"', page)]


def next_page(page: str) -> str | None:
    """Return the address of the next page, if there is one."""
    found = re.search(r'rel="next" href="\.(/[^"]*)"', page)
    return None if found is None else html.unescape(found[1])
