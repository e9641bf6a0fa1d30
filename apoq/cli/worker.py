"""``apoq worker``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final

import click
from click.core import ParameterSource

from apoq.cli.exits import BadUsage
from apoq.cli.loading import load, located
from apoq.cli.running import run_worker, worker_options
from apoq.cli.target import Target
from apoq.client.queue import Queue
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
    _refuse("schema", "a queue knows its own: Queue(schema=…)")
    make: Callable[[], Worker]
    if name is not None and ini is None:
        make = partial(_load, name, target, concurrency)
    elif ini is not None and name is None:
        _refuse("database_url", "a Pyramid application has its own")
        make = partial(_load_pyramid, ini)
    else:
        raise BadUsage("what is to be worked? Give module:object, such as myapp.tasks:worker, or --pyramid")
    run_worker(make, concurrency=concurrency, **options)


def _load(name: str, target: Target, concurrency: int | None) -> Worker:
    def make(queue: Queue) -> Worker:
        made.append(queue)
        return Worker(target.create_engine(pool_size=max(concurrency or 0, POOL_SIZE)), queue)

    made: list[Queue] = []
    worker = load(name, make)
    if not made:
        _refuse("database_url", f"{name} is a Worker, which has its own engine")
    return worker


def _load_pyramid(ini: str) -> Worker:
    with located(f"{ini} can't be loaded"):
        worker: Worker = import_module("apoq.pyramid").load_worker(ini)
    return worker


def _refuse(option: str, reason: str) -> None:
    """Refuse what was said on the command line and would do nothing."""
    context: click.Context | None = click.get_current_context()
    while context is not None:
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            raise BadUsage(f"--{option.replace('_', '-')} means nothing here: {reason}")
        context = context.parent
