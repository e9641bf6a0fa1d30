"""Requests and responses, independent of ASGI and WSGI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, urlsplit

MAX_BODY: Final = 64 * 1024
"""Bytes of a form at most."""

FORM: Final = "application/x-www-form-urlencoded"

HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    # Not "no-referrer", with which browsers send `Origin: null` with our own forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""The headers of each response."""


@dataclass(frozen=True)
class Request:
    """A request, without the place at which the dashboard is mounted."""

    method: str
    path: str
    """From the dashboard's own root, such as ``/tasks``; empty if the last slash of the root is missing."""
    mount: str = ""
    """The place of the dashboard, as far as the server knows it."""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    """By names in lower case."""
    body: bytes = b""
    client: str | None = None
    """The address that the connection comes from."""
    is_secure: bool = False
    """Whether it came by https."""
    http_version: str = "1.1"

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies, as they were sent: those of the application may be in any form."""
        pairs = (each.partition("=") for each in self.headers.get("cookie", "").split(";"))
        return {name.strip(): value.strip() for name, _, value in pairs}

    @property
    def form(self) -> dict[str, str]:
        """The fields of a form; none if the body isn't one."""
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
            return {}
        return read_fields(self.body.decode("utf-8", "replace"))

    @property
    def host(self) -> str:
        """The host that the browser has asked, with the port."""
        return self.headers.get("host", "").strip().lower()

    @property
    def host_name(self) -> str:
        """The host without the port."""
        try:
            return urlsplit(f"//{self.host}").hostname or ""
        except ValueError:
            return ""


@dataclass
class Response:
    """A response; the headers are added to `HEADERS`."""

    body: bytes = b""
    status: int = 200
    content_type: str = "text/html; charset=utf-8"
    headers: list[tuple[str, str]] = field(default_factory=list)

    def all_headers(self) -> list[tuple[str, str]]:
        """Return the headers of the response, those of every response included."""
        own = {name for name, _ in self.headers}
        common = [(name, value) for name, value in HEADERS.items() if name not in own]
        length = ("content-length", str(len(self.body)))
        return [*common, ("content-type", self.content_type), length, *self.headers]


def redirect(location: str) -> Response:
    """Return a redirection to a place that is relative to the path of the request."""
    return Response(status=303, headers=[("location", location)])


def read_fields(text: str) -> dict[str, str]:
    """Read the fields of a query or a form: the last value of each, without NULs, which no text can have."""
    try:
        fields = parse_qsl(text, keep_blank_values=True, max_num_fields=100)
    except ValueError:
        return {}
    return {name: value.replace("\0", "") for name, value in fields}
