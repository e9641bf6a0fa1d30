"""``flask apoq``: the commands of ``apoq``, on the application's database."""

from __future__ import annotations

import click
from flask import current_app
from flask.cli import with_appcontext
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.cli.exits import explained
from apoq.cli.group import Commands
from apoq.cli.target import Target
from apoq.databases import sync_twin
from apoq.flask.installed import KEY, Installed


def group() -> click.Group:
    """Make the group ``apoq`` of an application's command line."""
    return Commands(
        "apoq", callback=_aim, commands=[worker], help="Work and look after the background tasks."
    )


@with_appcontext
@click.pass_context
def _aim(ctx: click.Context) -> None:
    found = _installed()
    engine = found.database.engine
    ctx.obj = Target(
        engine=sync_twin(engine) if isinstance(engine, AsyncEngine) else engine, schema=found.queue.schema
    )


def _installed() -> Installed:
    found: Installed = current_app.extensions[KEY]
    return found


@click.command("worker")
def worker() -> None:
    """Work tasks until told to stop."""
    with explained():
        _installed().worker.run()
