"""``apoq worker``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
"""The least number of connections that SQLAlchemy keeps for the engine."""


@click.command("worker")
@click.argument("names", metavar="[MODULE:OBJECT]...", nargs=-1)
@click.option(
    "--pyramid", "ini", metavar="INI", help="Run the worker of the Pyramid application in this file instead."
)
@worker_options
@click.pass_obj
def command(
    target: Target, /, names: tuple[str, ...], ini: str | None, concurrency: int | None, **options: Any
) -> None:
    """Run a worker until SIGINT (Ctrl-C) or SIGTERM.

    MODULE:OBJECT is a Queue, a Worker, or a function that returns one of these. The worker of a Queue runs
    its typed tasks in the database of --database-url; you may give several queues. A Worker has its own
    engine and queues.

    \b
        apoq worker myapp.tasks:queue
        apoq worker users.tasks:queue orders.tasks:queue --concurrency 16
        apoq worker myapp.tasks:queue --reload
        apoq worker myapp.tasks:queue --burst

    At the signal, it claims no more tasks, waits for the running ones, and says how many there are. A second
    signal ends it at once.
    """  # noqa: D301 - click's sign
    _refuse("schema", "a queue has its own: Queue(schema=…)")
    make: Callable[[], Worker]
    if names and ini is None:
        make = partial(_load, names, target, concurrency)
    elif ini is not None and not names:
        _refuse("database_url", "a Pyramid application has its own")
        make = partial(_load_pyramid, ini)
    else:
        raise BadUsage(
            "missing argument MODULE:OBJECT: give a Queue or a Worker, such as myapp.tasks:queue, or "
            "--pyramid INI"
        )
    run_worker(make, concurrency=concurrency, **options)


def _load(names: Sequence[str], target: Target, concurrency: int | None) -> Worker:
    def make(queues: Sequence[Queue]) -> Worker:
        made.extend(queues)
        return Worker(target.create_engine(pool_size=max(concurrency or 0, POOL_SIZE)), *queues)

    made: list[Queue] = []
    worker = load(names, make)
    if not made:
        _refuse("database_url", f"{names[0]} is a Worker, which has its own engine")
    return worker


def _load_pyramid(ini: str) -> Worker:
    with located(f"{ini} can't be loaded"):
        pyramid = import_module("apoq.pyramid")
        try:
            worker: Worker = pyramid.load_worker(ini)
        except pyramid.Misconfigured as error:
            raise BadUsage(str(error)) from error
    return worker


def _refuse(option: str, reason: str) -> None:
    """Fail if an option was given that would have no effect."""
    context: click.Context | None = click.get_current_context()
    while context is not None:
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            raise BadUsage(f"--{option.replace('_', '-')} has no effect here: {reason}; leave it out")
        context = context.parent
