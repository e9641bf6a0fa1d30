"""Run a worker as a program of its own: in this process, or in several that are watched over."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

import click

from apoq.cli import logs
from apoq.cli.ending import Ending
from apoq.cli.exits import BadUsage
from apoq.cli.status import STATUS_INTERVAL_SECONDS, Status, every, is_wanted
from apoq.cli.supervisor import Supervisor, again, check_platform, obey, report, take_lifeline
from apoq.cli.values import patience
from apoq.worker import Worker
from apoq.worker.signals import caught, end_as_pid_1
from apoq.worker.worker import STOP_TIMEOUT

logger = logging.getLogger(__name__)

_OPTIONS = (
    click.option(
        "--concurrency", type=click.IntRange(min=1), metavar="N", help="Tasks at once, in each process."
    ),
    click.option("--queues", metavar="A,B", help="Work only those of its queues that have these names."),
    click.option(
        "--processes",
        type=click.IntRange(min=1),
        metavar="N",
        help="Run N processes, and replace those that die.",
    ),
    click.option(
        "--timeout",
        type=patience,
        default=STOP_TIMEOUT.total_seconds(),
        show_default=True,
        metavar="SECONDS",
        help="What running tasks get to end in when it is stopped; then they are given back.",
    ),
    click.option("--log-format", type=click.Choice(logs.FORMATS), help="Default: text."),
    click.option("--log-level", type=click.Choice(logs.LEVELS), help="Default: info."),
)


def worker_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take the options of `run_worker`."""
    return reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), function)


def run_worker(
    make: Callable[[], Worker],
    *,
    concurrency: int | None,
    queues: str | None,
    processes: int | None,
    timeout: float,
    log_format: str | None,
    log_level: str | None,
) -> None:
    """Run the worker that `make` answers until SIGINT or SIGTERM; a second one ends the program at once.

    With `processes`, this one starts its own command line that many times, and calls `make` in none but them.
    """
    end_as_pid_1()
    lifeline = take_lifeline()
    if processes is not None and lifeline is None:
        check_platform()
        logs.set_up(log_format, log_level)
        sys.exit(Supervisor(again(), processes, timeout=timeout).run())
    ending = Ending(timeout)
    if lifeline is not None:
        obey(lifeline, ending.stop)
    worker = make()
    logs.set_up(log_format, log_level)
    try:
        worker._adjust(  # noqa: SLF001 - our own
            queues=None if queues is None else _names(queues), concurrency=concurrency
        )
    except ValueError as error:
        raise BadUsage(str(error)) from error
    if not worker.types:
        raise BadUsage(
            "this worker has nothing to work: no task of its queues has been defined (@queue.task), and no "
            "processor given (worker.use), in what was imported"
        )
    logger.info("working %s", ", ".join(worker.types))
    # What a second Ctrl-C does, for the first is caught.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = Status()

    def begin(_stop: object) -> None:
        if lifeline is not None:
            report(lifeline, worker)
        elif is_wanted():
            every(STATUS_INTERVAL_SECONDS, lambda: status.say(worker.stats()))

    with caught() as signals, ending.watch(signals):
        worker._run_until(signals, timeout, on_start=begin, on_stop=ending.begin)  # noqa: SLF001 - our own
    if lifeline is None and is_wanted():
        status.say(worker.stats())


def _names(queues: str) -> list[str]:
    return [name.strip() for name in queues.split(",") if name.strip()]
