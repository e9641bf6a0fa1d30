"""``flask apoq``: the commands of ``apoq`` for the application's database."""

from __future__ import annotations

from typing import Any

import click
from flask import current_app
from flask.cli import with_appcontext
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.cli.exits import UPGRADE, explained
from apoq.cli.group import Commands
from apoq.cli.running import run_worker, worker_options
from apoq.cli.target import Target
from apoq.flask.installed import KEY, Installed
from apoq.postgres.engine_twins import sync_twin
from apoq.postgres.urls import check_engine


def group() -> click.Group:
    """Return the group ``apoq`` of an application's command line."""
    return Commands("apoq", callback=_set_target, commands=[_worker], help="Run and manage background tasks.")


@with_appcontext
@click.pass_context
def _set_target(ctx: click.Context) -> None:
    with explained():
        found = _installed()
        engine = found.database.engine
        check_engine(engine)
    if "migrate" in current_app.extensions:  # Flask-Migrate's
        directory = current_app.extensions["migrate"].directory
        ctx.meta[UPGRADE] = "flask db upgrade"
        ctx.default_map = {"revision": {"directory": directory, "bind": found.database.bind}}
    if isinstance(engine, AsyncEngine):
        engine = sync_twin(engine)
        ctx.call_on_close(engine.dispose)
    ctx.obj = Target(engine=engine, schema=found.queue.schema)


@click.command("worker")
@worker_options
def _worker(concurrency: int | None, **options: Any) -> None:
    """Run the application's worker until SIGINT (Ctrl-C) or SIGTERM.

    \b
        flask apoq worker
        flask apoq worker --reload
        flask apoq worker --burst

    At the signal, it claims no more tasks, waits for the running ones, and says how many there are. A second
    signal ends it at once.
    """  # noqa: D301 - click's sign
    found = _installed()
    run_worker(lambda: found.worker, concurrency=concurrency, **options)


def _installed() -> Installed:
    found: Installed = current_app.extensions[KEY]
    return found
