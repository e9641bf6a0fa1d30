"""The dashboard as an ASGI application, for FastAPI, Starlette and uvicorn."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Final

import anyio.to_thread
import sqlalchemy as sa
from anyio import CapacityLimiter
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request as StarletteRequest

from apoq.dashboard.access import (
    AuthorizeASGI,
    Role,
    checked_role,
    is_local,
)
from apoq.dashboard.dashboard import Dashboard
from apoq.dashboard.messages import MAX_BODY, Request, Response, read_fields
from apoq.dashboard.redaction import Redact
from apoq.dashboard.site import Site
from apoq.errors import glimpse

logger = logging.getLogger("apoq.dashboard")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

THREADS: Final = 8
"""How many requests wait for the database at once: not on the threads of the application's own requests."""

NOT_LOCAL: Final = (
    "Without authorize=, the dashboard may only be seen from the same machine, and not through a proxy or "
    "by HTTP/1.0: see the documentation of apoq.dashboard.app."
)


class DashboardApp:
    """An ASGI application, to mount under any path."""

    def __init__(self, dashboard: Dashboard, authorize: AuthorizeASGI | None, default: Role | None) -> None:
        self._dashboard = dashboard
        self._authorize = authorize
        self._default = default
        self._limiter: CapacityLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] == "http":
            await self._respond(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self.close()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        if body is None:
            return
        request = _read(scope, body)
        role = await self._role(StarletteRequest(scope), request)
        if self._limiter is None:
            self._limiter = CapacityLimiter(THREADS)
        respond = partial(
            self._dashboard.respond, request, role, NOT_LOCAL if self._authorize is None else ""
        )
        response: Response = await anyio.to_thread.run_sync(respond, limiter=self._limiter)
        headers = [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in response.all_headers()
        ]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        body = b"" if request.method == "HEAD" else response.body
        await send({"type": "http.response.body", "body": body})

    async def _role(self, native: StarletteRequest, request: Request) -> Role | None:
        if self._authorize is None:
            return self._default if is_local(request) else None
        try:
            given: object = self._authorize(native)
            if inspect.isawaitable(given):
                given = await given
        except Exception:
            logger.exception("authorize raised an exception: access is denied")
            return None
        return checked_role(given)

    def close(self) -> None:
        """Close the connections to the database."""
        self._dashboard.site.close()


def app(
    engine: sa.Engine | AsyncEngine,
    *,
    authorize: AuthorizeASGI | None = None,
    schema: str | None = None,
    redact: Redact | None = None,
    environment: str | None = None,
    secret: str | bytes | None = None,
) -> DashboardApp:
    """Return the dashboard as an ASGI application, to mount under any path.

    Args:
        engine: The engine of the database with apoq's tables. The dashboard makes a few connections of its
            own from it; pages are read in read-only transactions.
        authorize: A function, or a coroutine function, that takes the `starlette.requests.Request` and
            returns ``"read"``, ``"write"``, or None for no access. If it raises an exception or returns
            anything else, there is no access. Without it, the dashboard may be read from the same machine.
            Behind a proxy, `authorize` must be given: only a proxy that adds a header such as
            ``X-Forwarded-For``, or that speaks HTTP/1.0, is recognised and refused without it.
        schema: The schema of apoq's tables. By default the connection's search_path chooses it.
        redact: A function that takes the type and the data of a task, and returns the data that viewers may
            see. Values of keys such as ``password`` or ``token`` are always hidden.
        environment: A name that is shown on each page, such as ``"staging"``; ``"production"`` is red.
        secret: The secret that protects forms, the same in all processes. By default it is derived from the
            database's URL with its password.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `secret` is empty.
        InvalidTask: If `schema` is invalid.
        UnsupportedDatabase: If the engine is not on PostgreSQL through psycopg 3, or translates apoq's
            schema.
    """
    check_authorize(authorize)
    site = Site(engine, schema=schema, redact=redact, environment=environment, secret=secret)
    return DashboardApp(Dashboard(site), authorize, "read")


def check_authorize(authorize: object) -> None:
    """Raise TypeError if it is not a function."""
    if authorize is not None and not callable(authorize):
        raise TypeError(f"authorize must be a function of the request, got {glimpse(authorize)}")


async def _body(receive: Receive) -> bytes | None:
    """Return the body, up to one byte more than a form may have; None if it isn't whole."""
    body = b""
    while len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return body[: MAX_BODY + 1]


def _read(scope: Scope, body: bytes) -> Request:
    root, path = scope.get("root_path", "").rstrip("/"), scope["path"]
    if root and (path == root or path.startswith(f"{root}/")):
        path = path.removeprefix(root)  # newer servers include the root in the path
    client = scope.get("client")
    return Request(
        scope["method"],
        path,
        root,
        read_fields(scope.get("query_string", b"").decode("latin-1")),
        {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]},
        body,
        client[0] if client else None,
        scope.get("scheme") == "https",
        scope.get("http_version", "1.1"),
    )
