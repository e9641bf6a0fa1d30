"""``apoq worker``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final

import click

from apoq.cli.exits import BadUsage
from apoq.cli.loading import load
from apoq.cli.running import run_worker, worker_options
from apoq.cli.target import Target
from apoq.queue import Queue
from apoq.worker import Worker

POOL_SIZE: Final = 5
"""Connections that SQLAlchemy keeps for an engine, at least."""


@click.command("worker")
@click.argument("name", metavar="[MODULE:OBJECT]", required=False)
@click.option(
    "--pyramid", "ini", metavar="INI", help="Work for the Pyramid application of this file instead."
)
@worker_options
@click.pass_obj
def command(
    target: Target, /, name: str | None, ini: str | None, concurrency: int | None, **options: Any
) -> None:
    """Work tasks: run a worker until it is told to stop.

    MODULE:OBJECT is a Worker, a Queue whose tasks are to be worked on --database-url, or a function that
    answers one of these. A Worker has its own engine.

    SIGINT (Ctrl-C) or SIGTERM stops it: it claims no more, and waits for what runs. A second one ends it at
    once.
    """
    make: Callable[[], Worker]
    if name is not None and ini is None:
        make = partial(load, name, partial(_make, target, concurrency))
    elif ini is not None and name is None:
        make = partial(import_module("apoq.pyramid").load_worker, ini)
    else:
        raise BadUsage("what is to be worked? Give module:object, such as myapp.tasks:worker, or --pyramid")
    run_worker(make, concurrency=concurrency, **options)


def _make(target: Target, concurrency: int | None, queue: Queue) -> Worker:
    engine = target.create_engine(pool_size=max(concurrency or 0, POOL_SIZE))
    return Worker(engine, queue)
