"""Who may see the dashboard, and who may change something by it.

Without `authorize`, only a browser on the same machine may, and only to read.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

from starlette.requests import Request as StarletteRequest

from apoq.dashboard.messages import Request
from apoq.errors import glimpse

logger = logging.getLogger("apoq.dashboard")

Role: TypeAlias = Literal["read", "write"]
AuthorizeASGI: TypeAlias = Callable[[StarletteRequest], Role | Awaitable[Role | None] | None]
AuthorizeWSGI: TypeAlias = Callable[[dict[str, Any]], Role | None]

READ: Final = "read"
WRITE: Final = "write"

FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers of a proxy: the connection then comes from the proxy, and not from the browser."""


def checked_role(given: object) -> Role | None:
    """Return the role that `authorize` has returned; None, which denies access, for an invalid value."""
    if given is None:
        return None
    if isinstance(given, str):
        if given == READ:
            return "read"
        if given == WRITE:
            return "write"
    logger.error('authorize must return None, "read" or "write", got %s: access is denied', glimpse(given))
    return None


def is_local(request: Request) -> bool:
    """Return whether a request comes from a browser on this machine, and not through a known kind of proxy.

    Only a proxy that adds one of the `FORWARDED` headers or speaks HTTP/1.0 is recognised.
    """
    if request.http_version < "1.1" or any(name in request.headers for name in FORWARDED):
        return False
    # A page of another site may have a name that leads to 127.0.0.1 (DNS rebinding).
    return _is_loopback(request.client) and (
        request.host_name == "localhost" or _is_loopback(request.host_name)
    )


def _is_loopback(address: str | None) -> bool:
    try:
        return ip_address(address or "").is_loopback
    except ValueError:
        return False


def is_from_here(request: Request) -> bool:
    """Return whether a browser sends this request from a page of the dashboard's own site.

    Browsers send `Sec-Fetch-Site` over https and to localhost, and `Origin` with each POST.
    """
    if (site := request.headers.get("sec-fetch-site")) is not None:
        return site == "same-origin"
    origin = request.headers.get("origin")
    return bool(origin and request.host) and _place(origin) == request.host


def _place(origin: str | None) -> str | None:
    """Return the host and the port of an origin, without its scheme: a proxy may have ended TLS."""
    parts = urlsplit(origin or "")
    return parts.netloc.lower() if parts.scheme in {"http", "https"} else None
