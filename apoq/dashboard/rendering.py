"""Renders the pages. Everything is escaped by Jinja; no template marks anything of a task as safe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from apoq.dashboard.plot import bars
from apoq.dashboard.views import WAITS_FOR, duration, every, utc
from apoq.monitor.formatting import ago, clean, length, number

STATIC: Final = Path(__file__).parent / "static"

CONTENT_TYPES: Final = {
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""The static files; there are no others."""


@cache
def environment() -> Environment:
    """Return the environment of the templates."""
    made = Environment(
        loader=PackageLoader("apoq.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "ago": ago,
        "clean": clean,
        "count": number,
        "duration": duration,
        "every": every,
        "iso": _iso,
        "span": length,
        "utc": utc,
    }
    made.globals |= {"bars": bars, "WAITS_FOR": WAITS_FOR, "version": static_version()}
    return made


def render(template: str, values: Mapping[str, Any]) -> bytes:
    """Return a page."""
    # A character that UTF-8 doesn't have can't come from PostgreSQL, but from an address.
    return environment().get_template(template).render(values).encode("utf-8", "replace")


@cache
def static_file(name: str) -> bytes:
    """Return one of `CONTENT_TYPES`."""
    return (STATIC / name).read_bytes()


@cache
def static_version() -> str:
    """Return a hash of the static files, so that browsers keep them until they change."""
    return hashlib.sha256(b"".join(map(static_file, CONTENT_TYPES))).hexdigest()[:12]


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
