"""Serves a dashboard by itself, for `apoq dashboard`."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import uvicorn

from apoq.dashboard.asgi_face import ASGIApp, DashboardApp
from apoq.dashboard.dashboard import Dashboard
from apoq.dashboard.passwords import BasicAuthentication
from apoq.dashboard.site import Site


def make_app(
    engine: sa.Engine,
    schema: str | None,
    *,
    writes: bool,
    environment: str | None,
    user: str | None,
    password: str | None,
    is_behind_proxy: bool,
) -> ASGIApp:
    """Return the application: with a password, for everyone behind a proxy, or for this machine only."""
    site = Site(engine, schema=schema, redact=None, environment=environment, secret=None)
    role: Any = "write" if writes else "read"
    is_open = is_behind_proxy or user is not None
    app = DashboardApp(Dashboard(site), (lambda _request: role) if is_open else None, role)
    return app if user is None else BasicAuthentication(app, user, password or "")


def serve(app: ASGIApp, listener: socket.socket, *, is_behind_proxy: bool) -> None:
    """Serve until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        server_header=False,
        # Otherwise, anyone could claim to be on this machine.
        proxy_headers=is_behind_proxy,
        forwarded_allow_ips="*" if is_behind_proxy else None,
        timeout_graceful_shutdown=5,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listener])


def read_password(path: Path) -> str:
    """Return the first line of a file."""
    return path.read_text("utf-8").partition("\n")[0].rstrip("\r")
