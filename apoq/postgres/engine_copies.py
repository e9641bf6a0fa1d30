"""Engines in other processes that connect in the same way as the caller's engine."""

from __future__ import annotations

import json
from typing import Any, Final

from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.errors import UnsupportedDatabase
from apoq.postgres.connections import prepare_where_kept
from apoq.postgres.engine_twins import callers_listeners, options_of
from apoq.postgres.urls import on_psycopg, sync_side

_ARE_EVERYWHERE: Final = ("opentelemetry.", "sentry_sdk.")
"""Modules whose listeners are added to all engines of a process, and change no connection."""


def settings_of(engine: Engine | AsyncEngine) -> dict[str, Any]:
    """Return the arguments of an engine as JSON, with the password, for `engine_from`.

    Raises `UnsupportedDatabase` if one of them has no JSON, such as a function.
    """
    source = sync_side(engine)
    options = {name: value for name, value in options_of(source, is_async=False).items() if value is not None}
    options["execution_options"] = dict(options["execution_options"])
    unsendable = [name for name, value in options.items() if not _is_json(value)]
    listeners = [*source.dialect.dispatch.do_connect.listeners, *callers_listeners(source)]
    unsendable += [
        f"the listener {getattr(listener, '__qualname__', listener)}"
        for listener in listeners
        if not str(getattr(listener, "__module__", "")).startswith(_ARE_EVERYWHERE)
    ]
    if unsendable:
        raise UnsupportedDatabase(
            "task.session of an isolated task needs an engine in another process, which can't be made like "
            f"the worker's because of {', '.join(unsendable)}: give a function that makes one, "
            "Worker(…, isolated_engine=make_engine)"
        )
    return {"url": on_psycopg(source.url).render_as_string(hide_password=False), **options}


def engine_from(settings: dict[str, Any]) -> Engine:
    """Return an engine with these settings and a pool for one task at a time."""
    # With a ping, because an outage may have passed while the process had nothing to do.
    engine = create_engine(**settings, pool_size=1, pool_pre_ping=True)
    prepare_where_kept(engine)
    return engine


def _is_json(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
