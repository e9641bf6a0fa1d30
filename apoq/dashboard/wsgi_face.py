"""The dashboard as a WSGI application, for Flask, Pyramid and Django."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

import sqlalchemy as sa

from apoq.dashboard.access import AuthorizeWSGI, Role, checked_role, is_local
from apoq.dashboard.asgi_face import NOT_LOCAL, check_authorize
from apoq.dashboard.dashboard import Dashboard
from apoq.dashboard.messages import MAX_BODY, Request, read_fields
from apoq.dashboard.redaction import Redact
from apoq.dashboard.site import Site

logger = logging.getLogger("apoq.dashboard")

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


class DashboardWSGI:
    """A WSGI application, to mount under any path."""

    def __init__(self, dashboard: Dashboard, authorize: AuthorizeWSGI | None) -> None:
        self._dashboard = dashboard
        self._authorize = authorize

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Respond to a request."""
        request = _read(environ)
        refusal = NOT_LOCAL if self._authorize is None else ""
        response = self._dashboard.respond(request, self._role(environ, request), refusal)
        try:
            phrase = HTTPStatus(response.status).phrase
        except ValueError:
            phrase = ""
        headers = [(name.title(), value) for name, value in response.all_headers()]
        start_response(f"{response.status} {phrase}", headers)
        return [b"" if request.method == "HEAD" else response.body]

    def _role(self, environ: Environ, request: Request) -> Role | None:
        if self._authorize is None:
            return "read" if is_local(request) else None
        try:
            given = self._authorize(environ)
        except Exception:
            logger.exception("authorize raised an exception: access is denied")
            return None
        return checked_role(given)

    def close(self) -> None:
        """Close the connections to the database."""
        self._dashboard.site.close()


def wsgi(
    engine: sa.Engine,
    *,
    authorize: AuthorizeWSGI | None = None,
    schema: str | None = None,
    redact: Redact | None = None,
    environment: str | None = None,
    secret: str | bytes | None = None,
) -> DashboardWSGI:
    """Return the dashboard as a WSGI application, to mount under any path.

    Args:
        engine: The engine of the database with apoq's tables, as for `app`.
        authorize: A function that takes the WSGI environ and returns ``"read"``, ``"write"``, or None for no
            access, as for `app`.
        schema: The schema of apoq's tables. By default the connection's search_path chooses it.
        redact: A function that takes the type and the data of a task, as for `app`.
        environment: A name that is shown on each page, as for `app`.
        secret: The secret that protects forms, as for `app`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `secret` is empty.
        InvalidTask: If `schema` is invalid.
        UnsupportedDatabase: If the engine is not on PostgreSQL through psycopg 3, or translates apoq's
            schema.
    """
    check_authorize(authorize)
    site = Site(engine, schema=schema, redact=redact, environment=environment, secret=secret)
    return DashboardWSGI(Dashboard(site), authorize)


def _read(environ: Environ) -> Request:
    headers = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_") or name in {"CONTENT_TYPE", "CONTENT_LENGTH"}
    }
    return Request(
        environ["REQUEST_METHOD"],
        # WSGI's texts are bytes that are decoded as Latin-1.
        environ.get("PATH_INFO", "").encode("latin-1", "replace").decode("utf-8", "replace"),
        environ.get("SCRIPT_NAME", "").encode("latin-1", "replace").decode("utf-8", "replace"),
        read_fields(environ.get("QUERY_STRING", "")),
        headers,
        _body(environ),
        environ.get("REMOTE_ADDR"),
        environ.get("wsgi.url_scheme") == "https",
        environ.get("SERVER_PROTOCOL", "HTTP/1.1").removeprefix("HTTP/"),
    )


def _body(environ: Environ) -> bytes:
    """Return the body, up to one byte more than a form may have; nothing of one that isn't whole."""
    try:
        length = max(0, int(environ.get("CONTENT_LENGTH") or 0))
    except ValueError:
        length = 0
    length = min(length, MAX_BODY + 1)
    body: bytes = environ["wsgi.input"].read(length) if length else b""
    return body if len(body) == length else b""
